"""A Hugging Face folder in another dtype or in smaller files, and the gate that every export passes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from chaccu.artifact import manifest_sha256, read_manifest, verify_files, write_manifest
from chaccu.cli.main import app
from chaccu.conversation import TextTokenizer, load_format
from chaccu.errors import WeightsError
from chaccu.testing.tiny import build_llama
from chaccu.weights.token_identity import require_same_ids

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("gguf", reason="the train extra is not installed")

import torch

from chaccu.weights.checkpoint import Checkpoint, write_checkpoint
from chaccu.weights.recast import recast_model
from chaccu.weights.safetensors_file import TensorSpec

QUERY = "model.layers.0.self_attn.q_proj.weight"


def change_weights(folder: Path, **changed: torch.Tensor) -> None:
    checkpoint = Checkpoint(folder)
    tensors = {**{name: checkpoint.read(name) for name in checkpoint.entries}, **changed}
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    write_checkpoint(folder, specs, tensors.__getitem__)
    write_manifest(folder, read_manifest(folder))


def test_floating_point_changes_its_dtype_and_integers_stay(tmp_path: Path) -> None:
    import transformers

    folder = build_llama(tmp_path / "hf")
    counts = torch.arange(5)
    change_weights(folder, counts=counts)
    manifest = recast_model(folder, tmp_path / "out", dtype="bf16", max_shard_bytes=60_000)
    assert manifest == read_manifest(tmp_path / "out", kind="base")
    verify_files(tmp_path / "out", manifest.files)
    assert manifest.parents == {"base": manifest_sha256(folder)}
    before, after = Checkpoint(folder), Checkpoint(tmp_path / "out")
    assert len(after.files) > 2
    assert all(path.path.stat().st_size < 70_000 for path in after.files)
    assert torch.equal(after.read("counts"), counts)
    assert torch.equal(after.read(QUERY), before.read(QUERY).to(torch.bfloat16))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_without_a_dtype_only_the_files_change(tmp_path: Path) -> None:
    folder = build_llama(tmp_path / "hf")
    recast_model(folder, tmp_path / "out", max_shard_bytes=60_000)
    before, after = Checkpoint(folder), Checkpoint(tmp_path / "out")
    assert all(torch.equal(after.read(name), before.read(name)) for name in before.entries)


@pytest.mark.parametrize(
    ("value", "message"), [(70000.0, f"{QUERY} has values up to 70000"), (float("nan"), f"{QUERY} in .* not finite")]
)
def test_a_value_that_does_not_fit_is_named_and_nothing_is_left(value: float, message: str, tmp_path: Path) -> None:
    folder = build_llama(tmp_path / "hf")
    tensor = Checkpoint(folder).read(QUERY)
    tensor[3, 3] = value
    change_weights(folder, **{QUERY: tensor})
    with pytest.raises(WeightsError, match=message):
        recast_model(folder, tmp_path / "out", dtype="f16")
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]


def test_a_template_that_writes_another_text_gives_way_to_the_format_s(tmp_path: Path) -> None:
    folder = build_llama(tmp_path / "hf")
    stale = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": stale}))
    assert recast_model(folder, tmp_path / "out").facts["chat_template"] == "format"
    assert "<|im_start|>" in (tmp_path / "out" / "chat_template.jinja").read_text()
    assert "chat_template" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    # What writes the same stays as it is.
    own = (tmp_path / "out" / "chat_template.jinja").read_text() + "{# ours #}"
    (tmp_path / "out" / "chat_template.jinja").write_text(own)
    assert recast_model(tmp_path / "out", tmp_path / "again").facts["chat_template"] == "folder"
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == own


def test_another_tokenizer_than_in_training_is_refused(tmp_path: Path) -> None:
    folder = build_llama(tmp_path / "hf")
    trained = TextTokenizer.load(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    del tokenizer["model"]["merges"][10:]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(WeightsError, match="another tokenizer than its weights were trained with"):
        recast_model(folder, tmp_path / "out")
    with pytest.raises(WeightsError, match=r"x gives other ids .* they part at token \d+: \d+ \('"):
        require_same_ids(trained, TextTokenizer.load(folder), load_format("chatml"), "x")


def test_the_command_converts_each_way_and_says_what_does_not_go(tmp_path: Path) -> None:
    folder, gguf, back = build_llama(tmp_path / "hf"), tmp_path / "gguf", tmp_path / "back"

    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["weights", "convert", *arguments])
        return result.exit_code, result.output

    assert run(str(folder), "--to", "gguf", "--type", "f32", "--out", str(gguf))[0] == 0
    file = str(gguf / "model.gguf")
    assert run(file, "--format", "chatml", "--dtype", "f32", "--out", str(back))[0] == 0
    assert torch.equal(Checkpoint(back).read(QUERY), Checkpoint(folder).read(QUERY))
    assert "is there already" in run(file, "--format", "chatml", "--dtype", "f32", "--out", str(back))[1]
    code, output = run(str(back), "--dtype", "bf16", "--json", "--out", str(tmp_path / "half"))
    assert (code, json.loads(output[output.index("{") :])["settings"]["dtype"]) == (0, "bf16")
    for arguments in (
        (file, "--to", "gguf"),
        (file,),
        (str(folder), "--to", "gguf", "--dtype", "f16"),
        (str(folder), "--type", "f16"),
        (file, "--format", "chat"),
    ):
        result = CliRunner().invoke(app, ["weights", "convert", *arguments, "--out", str(tmp_path / "none")])
        assert result.exception is not None
        assert not (tmp_path / "none").exists()


def test_merging_passes_the_gate_too(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="the train extra is not installed")
    from chaccu.testing.tiny import build_adapter
    from chaccu.weights.merge import merge_adapter

    base = build_llama(tmp_path / "base")
    (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    merge_adapter(base, build_adapter(tmp_path / "adapter", base), tmp_path / "merged")
    assert "<|im_start|>" in (tmp_path / "merged" / "chat_template.jinja").read_text()
