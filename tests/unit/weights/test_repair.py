"""Folders that are broken as those in the wild are: each fault is found, shown, mended, and what is mended loads."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
safetensors_torch = pytest.importorskip("safetensors.torch")
load_file, save_file = safetensors_torch.load_file, safetensors_torch.save_file

from broken_folders import BROKEN, TEXTS, build_sound, copy, edit, files_of, write_pickle, write_shards  # noqa: E402

from chaccu.artifact import read_manifest, sha256_file, verify_files  # noqa: E402
from chaccu.conversation import Conversation, Message, load_format  # noqa: E402
from chaccu.errors import StorageError, UsageError, WeightsError  # noqa: E402
from chaccu.testing.tiny import build_llama  # noqa: E402
from chaccu.weights.repair import RepairOptions, examine_folder, mend_copy, mend_folder  # noqa: E402

IDS = torch.tensor([[1, 5, 300, 41, 260, 7]])


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sound(tmp_path_factory.mktemp("sound") / "model")


def load(folder: Path) -> tuple[Any, list[list[int]]]:
    """Logits of a few ids, and ids of a few texts, as transformers has them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        return model(IDS).logits, [tokenizer(text).input_ids for text in TEXTS]


@pytest.fixture(scope="module")
def expected(sound: Path) -> tuple[Any, list[list[int]]]:
    return load(sound)


def test_a_sound_folder_has_no_finding(sound: Path) -> None:
    assert examine_folder(sound).findings == []


@pytest.mark.parametrize("name", BROKEN)
def test_a_fault_is_found_and_mended(name: str, sound: Path, expected: tuple[Any, list[list[int]]], tmp_path: Path) -> None:
    faults, damage = BROKEN[name]
    folder = copy(sound, tmp_path / "model")
    damage(folder)
    before = files_of(folder)

    draft = examine_folder(folder)
    assert {finding.fault for finding in draft.findings} == faults
    assert all(finding.mendable for finding in draft.findings)
    assert files_of(folder) == before, "looking changes nothing"

    mend_folder(draft)
    assert examine_folder(folder).findings == []
    logits, ids = load(folder)
    assert torch.equal(logits, expected[0])
    assert ids == expected[1]

    after = files_of(folder)
    changed = [file for file in before if file.endswith(".json") and after.get(file) != before[file]]
    assert {file: after[f"{file}.orig"] for file in changed} == {file: before[file] for file in changed}
    mend_folder(examine_folder(folder))
    assert files_of(folder) == after, "mending twice is mending once"


def read_as_transformers(folder: Path) -> dict[str, Any]:
    """The tensors that transformers would load, without the buffers that it drops."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        found = load_file(folder / "model.safetensors")
    elif index.is_file():
        places = json.loads(index.read_bytes())["weight_map"]
        found = {name: load_file(folder / place)[name] for name, place in places.items()}
    else:
        found = {}
        for place in sorted(folder.glob("pytorch_model*.bin")):
            found |= torch.load(place, weights_only=True)
    return {name: tensor for name, tensor in found.items() if not name.endswith("inv_freq")}


def assert_equal_tensors(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def _rotary_shards(folder: Path) -> None:
    write_shards(folder)
    path = folder / "model-00001-of-00002.safetensors"
    save_file({**load_file(path), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, path)
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_bytes())["weight_map"]
    edit(index, weight_map={**places, "model.layers.0.self_attn.rotary_emb.inv_freq": path.name})


STOPPED = {
    "pickled shards": lambda folder: write_pickle(folder, parts=2),
    "rotary buffers in shards": _rotary_shards,
}
_CHANGES = ((Path, "replace"), (Path, "unlink"), (Path, "rename"), (Path, "mkdir"), (shutil, "rmtree"))


def mend_and_die(folder: Path, steps: int) -> bool:
    """Mend in a process that ends before its change number `steps` of the folder, as by SIGKILL; whether it came to its end."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    left = iter(range(steps))
    for owner, name in _CHANGES:
        real = getattr(owner, name)

        def change(*arguments: Any, real: Any = real, **options: Any) -> Any:
            if next(left, None) is None:
                os._exit(9)
            return real(*arguments, **options)

        setattr(owner, name, change)
    mend_folder(examine_folder(folder))
    os._exit(0)


@pytest.mark.parametrize("name", STOPPED)
def test_a_mending_that_is_killed_leaves_the_model_whole_and_is_begun_again(
    name: str, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "rotary buffers in shards":
        monkeypatch.setattr("chaccu.weights.repair.writing.MAX_SHARD_BYTES", 300_000)
    broken = copy(sound, tmp_path / "broken")
    STOPPED[name](broken)
    edit(broken / "config.json", architectures=["LLaMAForCausalLM"])
    wanted = read_as_transformers(sound)
    steps, done = 0, False
    while not done:
        folder = copy(broken, tmp_path / str(steps))
        done = mend_and_die(folder, steps)
        assert_equal_tensors(read_as_transformers(folder), wanted)
        mend_folder(examine_folder(folder))
        assert examine_folder(folder).findings == []
        assert_equal_tensors(read_as_transformers(folder), wanted)
        assert not list(folder.glob("*.bin"))
        assert not [path for path in folder.rglob("*") if path.name.startswith(".")]
        shutil.rmtree(folder)
        steps += 1
    assert steps > 5


def test_what_cannot_be_mended_is_said_and_left(sound: Path, tmp_path: Path) -> None:
    folder = copy(sound, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    edit(folder / "config.json", architectures=["LLaMAForCausalLM"])
    draft = examine_folder(folder)
    assert [(finding.fault, finding.mendable) for finding in draft.findings] == [("class-names", True), ("weights", False)]
    assert "is cut off: its tensors need" in draft.findings[1].problem
    mend_folder(draft)
    assert [finding.fault for finding in examine_folder(folder).findings] == ["weights"]


def _lose_shard(folder: Path) -> None:
    write_shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def _lose_pickled_shard(folder: Path) -> None:
    write_pickle(folder, parts=2)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()


def _two_models(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    shutil.copy(folder / "one.safetensors", folder / "other.safetensors")


def _own_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_x.XTokenizer", None]})


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (_lose_shard, "is not there"),
        (_lose_pickled_shard, "is not there"),
        (lambda folder: shutil.copy(folder / "model.safetensors", folder / "x.safetensors") and None, None),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
        (lambda folder: (folder / "config.json").write_text("{"), "is no JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "holds a list"),
        (lambda folder: (folder / "config.json").unlink(), "is missing: nothing says"),
        (lambda folder: [(folder / name).unlink() for name in ("tokenizer.json", "tokenizer.model")], "as is tokenizer.model"),
        (lambda folder: edit(folder / "model.safetensors.index.json", weight_map={"other": "y.safetensors"}), "names other"),
        (_two_models, "is both in"),
        (_own_tokenizer, "own code would make the tokenizer"),
        (lambda folder: (folder / "chat_template.jinja").write_text("{% if %}"), "malformed"),
    ],
)
def test_faults_that_need_a_person(damage: Any, problem: str | None, sound: Path, tmp_path: Path) -> None:
    folder = copy(sound, tmp_path / "model")
    damage(folder)
    findings = [finding for finding in examine_folder(folder).findings if not finding.mendable]
    if problem is None:
        assert findings == []
    else:
        assert re.search(problem, findings[0].problem)
        assert findings[0].mending


class Evil:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("is_archive", [True, False])
def test_a_pickle_that_would_run_something_is_refused_and_not_run(is_archive: bool, sound: Path, tmp_path: Path) -> None:
    folder = copy(sound, tmp_path / "model")
    write_pickle(folder)
    trace = tmp_path / "run"
    tensors = {**torch.load(folder / "pytorch_model.bin"), "w": Evil(trace)}
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=is_archive)
    (finding,) = examine_folder(folder).findings
    assert not finding.mendable
    assert "imports posix.system" in finding.problem
    mend_folder(examine_folder(folder))
    assert not trace.exists()
    assert (folder / "pytorch_model.bin").is_file()


def test_weights_that_are_not_finite_are_left_as_they_are(sound: Path, tmp_path: Path) -> None:
    folder = copy(sound, tmp_path / "model")
    write_pickle(folder)
    tensors = torch.load(folder / "pytorch_model.bin")
    tensors["model.norm.weight"][3] = float("nan")
    torch.save(tensors, folder / "pytorch_model.bin")
    before = files_of(folder)
    with pytest.raises(WeightsError, match=r"model\.norm\.weight .* not finite"):
        mend_folder(examine_folder(folder))
    with pytest.raises(WeightsError, match="not finite"):
        mend_copy(examine_folder(folder), tmp_path / "out")
    assert files_of(folder) == before
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_the_folder_as_it_was(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy(sound, tmp_path / "model")
    write_pickle(folder)
    before = files_of(folder)

    def write(self: Any, tensor: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("chaccu.weights.safetensors_file.SafetensorsWriter.write", write)
    with pytest.raises(StorageError, match="no space left"):
        mend_folder(examine_folder(folder))
    assert files_of(folder) == before


def test_a_copy_is_mended_and_the_folder_left(sound: Path, tmp_path: Path, expected: tuple[Any, list[list[int]]]) -> None:
    folder, out = copy(sound, tmp_path / "model"), tmp_path / "out"
    BROKEN["decapoda"][1](folder)
    (folder / "notes").mkdir()
    (folder / "notes" / "README.md").write_text("of whom")
    before = files_of(folder)
    seen: list[tuple[int, int]] = []
    manifest = mend_copy(examine_folder(folder), out, progress=lambda *done: seen.append(done))
    assert files_of(folder) == before
    assert examine_folder(out).findings == []
    logits, ids = load(out)
    assert torch.equal(logits, expected[0])
    assert ids == expected[1]
    assert seen[-1][0] == seen[-1][1]
    assert manifest == read_manifest(out, kind="base")
    verify_files(out, manifest.files)
    assert manifest.files["notes/README.md"].size_bytes == 7
    assert manifest.inputs == {path.name: sha256_file(path) for path in folder.glob("*.bin")}
    assert set(manifest.settings["repaired"]) == BROKEN["decapoda"][0]
    assert not list(out.glob("*.orig"))


def test_a_copy_of_both_forms_has_the_safe_one(sound: Path, tmp_path: Path) -> None:
    folder = copy(sound, tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    manifest = mend_copy(examine_folder(folder), tmp_path / "out")
    assert {path.name for path in folder.iterdir()} - {path.name for path in (tmp_path / "out").iterdir()} == {
        "pytorch_model.bin"
    }
    assert manifest.inputs == {"model.safetensors": manifest.files["model.safetensors"].sha256}


def test_a_copy_goes_nowhere_where_it_would_do_harm(sound: Path, tmp_path: Path) -> None:
    draft = examine_folder(sound)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    for out in (sound, sound / "out", tmp_path / "mine", tmp_path / "mine" / "letter.txt"):
        with pytest.raises(UsageError):
            mend_copy(draft, out)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


def test_one_tensor_under_two_names_is_written_once_where_the_config_ties_them(sound: Path, tmp_path: Path) -> None:
    for said, written in ((None, False), (True, False), (False, True)):
        folder = copy(sound, tmp_path / str(said))
        write_pickle(folder, tie=True)
        edit(folder / "config.json", tie_word_embeddings=said)
        wanted = torch.load(folder / "pytorch_model.bin")["lm_head.weight"]
        draft = examine_folder(folder)
        mend_folder(draft)
        assert examine_folder(folder).findings == []
        assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is written
        assert bool(draft.notes[:-1]) is (said is not None)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(model.lm_head.weight, wanted)
        assert torch.equal(model.get_input_embeddings().weight, wanted)


def _add_tokens(folder: Path, count: int) -> None:
    path = folder / "tokenizer.json"
    value = json.loads(path.read_text())
    size = len(value["model"]["vocab"])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    value["added_tokens"] += [{"id": size + at, "content": f"<new{at}>", **flags} for at in range(count)]
    path.write_text(json.dumps(value))


def test_tokens_without_a_row_get_the_mean_of_all_if_that_is_asked_for(sound: Path, tmp_path: Path) -> None:
    folder = copy(sound, tmp_path / "model")
    _add_tokens(folder, 3)
    (finding,) = examine_folder(folder).findings
    assert (finding.fault, finding.mendable) == ("missing-rows", False)
    assert "--grow-embeddings" in finding.mending
    options = RepairOptions(grow_embeddings=True)
    with pytest.raises(UsageError, match="copy alone"):
        mend_folder(examine_folder(folder, options))
    mend_copy(examine_folder(folder, options), tmp_path / "out")
    assert examine_folder(tmp_path / "out").findings == []
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    old = load_file(folder / "model.safetensors")
    for name, new in (
        ("model.embed_tokens.weight", model.get_input_embeddings().weight),
        ("lm_head.weight", model.lm_head.weight),
    ):
        rows = len(old[name])
        assert len(new) == rows + 3
        assert torch.equal(new[:rows], old[name])
        torch.testing.assert_close(new[rows:], old[name].mean(0).expand(3, -1))


@pytest.mark.parametrize("name", ["vicuna_v1.1", "chatml", "llama-2"])
def test_a_template_is_written_as_the_format_renders(name: str, sound: Path, tmp_path: Path) -> None:
    folder = copy(sound, tmp_path / "model")
    edit(folder / "tokenizer_config.json", chat_template="{{ messages }}")
    options = RepairOptions(chat_format=name)
    draft = examine_folder(folder, options)
    assert [(finding.fault, finding.mendable) for finding in draft.findings] == [("chat-template", True)]
    mend_folder(draft)
    assert examine_folder(folder, options).findings == []
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    turns = (Message("user", "What is a vicuña?"), Message("assistant", "An animal."), Message("user", "Big?"))
    for system in (None, "Be brief."):
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        said = [{"role": "system", "content": system}, *messages] if system else messages
        text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        wanted = load_format(name).render(Conversation(messages=turns, system=system), bos_token="<s>", eos_token="</s>").text
        assert text == "<s>" + wanted, "the tokenizer begins every text with BOS, and a template has to by itself"


def test_a_format_that_no_template_can_write_is_said(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # All that ship can be written.
    odd = msgspec.structs.replace(load_format("raw"), template="{% generation %}{{ messages[0].content }}{% endgeneration %}")
    monkeypatch.setattr("chaccu.weights.repair.tokenizer_faults.load_format", {"raw": odd}.__getitem__)
    (finding,) = examine_folder(sound, RepairOptions(chat_format="raw")).findings
    assert (finding.fault, finding.mendable) == ("chat-template", False)
    assert "chaccu renders it itself" in finding.mending
    monkeypatch.undo()
    with pytest.raises(UsageError, match="no chat format"):
        examine_folder(sound, RepairOptions(chat_format="vicunja"))


def test_of_two_templates_the_one_that_is_not_read_goes(sound: Path, tmp_path: Path) -> None:
    folder = copy(sound, tmp_path / "model")
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    edit(folder / "tokenizer_config.json", chat_template="stale")
    mend_folder(examine_folder(folder))
    assert transformers.AutoTokenizer.from_pretrained(folder).chat_template == template
    assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_bytes())


def test_a_template_that_chaccu_cannot_follow_is_no_fault(sound: Path, tmp_path: Path) -> None:
    folder = copy(sound, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(
        "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    )
    draft = examine_folder(folder)
    assert draft.findings == []
    assert "cannot follow the chat template" in draft.notes[0]


def test_code_of_the_folder_is_named_and_is_no_fault(sound: Path, tmp_path: Path) -> None:
    folder = copy(sound, tmp_path / "model")
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_x.XForCausalLM"})
    (folder / "modeling_x.py").write_text("raise SystemExit('run')")
    draft = examine_folder(folder)
    assert draft.findings == []
    assert "modeling_x.XForCausalLM" in draft.notes[0]


def test_a_manifest_is_kept_true(tmp_path: Path) -> None:
    folder = build_llama(tmp_path / "model")
    before = read_manifest(folder)
    edit(folder / "config.json", architectures=["LLaMAForCausalLM"])
    draft = examine_folder(folder)
    assert [finding.fault for finding in draft.findings] == ["class-names", "manifest"]
    mend_folder(draft)
    manifest = read_manifest(folder)
    verify_files(folder, manifest.files)
    assert manifest.files["model.safetensors"] == before.files["model.safetensors"]
    assert (manifest.kind, manifest.tokenizer_sha256) == ("base", before.tokenizer_sha256)
    assert manifest.settings == {"repaired": ["class-names", "manifest"]}


def test_a_damaged_manifest_is_said_and_stops_nothing(tmp_path: Path) -> None:
    folder = build_llama(tmp_path / "model")
    (folder / "manifest.json").write_text("{")
    edit(folder / "config.json", architectures=["LLaMAForCausalLM"])
    draft = examine_folder(folder)
    assert [(finding.fault, finding.mendable) for finding in draft.findings] == [("class-names", True), ("manifest", False)]
    mend_folder(draft)
    assert [finding.fault for finding in examine_folder(folder).findings] == ["manifest"]
    assert mend_copy(examine_folder(folder), tmp_path / "out").parents == {}


def test_originals_are_the_first_ones_and_are_left_out_on_demand(sound: Path, tmp_path: Path) -> None:
    folder = copy(sound, tmp_path / "model")
    edit(folder / "config.json", architectures=["LLaMAForCausalLM"])
    first = (folder / "config.json").read_bytes()
    mend_folder(examine_folder(folder))
    edit(folder / "config.json", vocab_size=7)
    mend_folder(examine_folder(folder))
    assert (folder / "config.json.orig").read_bytes() == first
    other = copy(sound, tmp_path / "other")
    edit(other / "config.json", vocab_size=7)
    mend_folder(examine_folder(other), backup=False)
    assert not list(other.glob("*.orig"))
