from __future__ import annotations

from pathlib import Path

import pytest

from chaccu.artifact import Manifest, write_manifest
from chaccu.engine import choose_engine, load_engine, resolve_model
from chaccu.engine.scripted import parse_script
from chaccu.errors import ArtifactError, EngineError, UsageError


def make_folder(folder: Path, *files: str, manifest: Manifest | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    for name in files:
        (folder / name).write_bytes(b"")
    if manifest is not None:
        write_manifest(folder, manifest)
    return folder


def test_the_manifest_names_model_and_format(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", "model.gguf", manifest=Manifest(kind="gguf", name="vicky", chat_format="gemma-3"))
    source = resolve_model(str(folder))
    assert (source.name, source.chat_format, source.gguf) == ("vicky", "gemma-3", folder / "model.gguf")
    assert resolve_model(str(folder), name="other", chat_format="chatml").chat_format == "chatml"
    assert choose_engine(source) == ("llamacpp", "it holds model.gguf, a GGUF file")


def test_a_missing_model_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="there is no model at") as caught:
        resolve_model(str(tmp_path / "nowhere"))
    assert "check the path" in str(caught.value)


def test_a_format_is_never_guessed(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", "config.json", "model.safetensors")
    with pytest.raises(UsageError, match="never guessed") as caught:
        resolve_model(str(folder))
    assert "vicuna_v1.1" in str(caught.value)
    source = resolve_model(str(folder), chat_format="chatml")
    assert (source.name, source.hf) == ("m", folder)
    assert choose_engine(source)[0] == "transformers"


def test_an_unknown_format_names_the_near_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"vicuna_v1\.1"):
        resolve_model("scripted:a", chat_format="vicuna")


def test_folders_that_cannot_be_served_say_why(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no weights"):
        resolve_model(str(make_folder(tmp_path / "empty")), chat_format="chatml")
    with pytest.raises(EngineError, match="2 GGUF files"):
        resolve_model(str(make_folder(tmp_path / "two", "a.gguf", "b.gguf")), chat_format="chatml")
    adapter = make_folder(tmp_path / "adapter", "config.json", "a.safetensors", manifest=Manifest(kind="adapter", name="a"))
    with pytest.raises(ArtifactError, match="adapter"):
        resolve_model(str(adapter))
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(EngineError, match=r"must be a \.gguf"):
        resolve_model(str(tmp_path / "x.bin"), chat_format="chatml")


def test_a_lone_gguf_takes_its_name_from_the_file(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", "tiny.gguf")
    source = resolve_model(str(folder / "tiny.gguf"), chat_format="chatml")
    assert (source.name, source.folder) == ("tiny", folder)


def test_engines_are_named_not_guessed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="llamacpp"):
        load_engine("lamacpp")
    scripted = resolve_model("scripted:a")
    assert choose_engine(scripted)[0] == "scripted"
    with pytest.raises(EngineError, match=r"needs a \.gguf file"):
        choose_engine(scripted, "llamacpp")


def test_a_file_that_is_no_gguf_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    from chaccu.engine import EngineOptions

    (tmp_path / "bad.gguf").write_bytes(b"<html>not a model")
    with pytest.raises(EngineError, match="is no GGUF file"):
        load_engine("llamacpp").load(resolve_model(str(tmp_path / "bad.gguf"), chat_format="chatml"), EngineOptions())


def test_scripts_are_checked() -> None:
    assert parse_script("scripted:a?tokens=3&text=x%20y").text == "x y"
    with pytest.raises(UsageError, match="tokens_per_s"):
        parse_script("scripted:a?token_per_s=3")
    with pytest.raises(UsageError, match="wrong value"):
        parse_script("scripted:a?tokens=many")
