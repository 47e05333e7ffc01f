"""A recipe's model is a folder, or fetched from the hub, or named as missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaccu.errors import TrainError
from chaccu.train.base_model import find_base

huggingface_hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")


def test_a_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "model").mkdir(parents=True)
    assert find_base("someone/model") == Path("someone/model")
    assert find_base(str(tmp_path)) == tmp_path


def test_a_hub_id_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, "*.safetensors" in allow_patterns, "*.bin" in allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert find_base("someone/a-model.v1") == tmp_path
    assert asked == [("someone/a-model.v1", True, False)]


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./missing", "~/no such model", "runs/base/deeper/model"])
def test_a_path_that_is_not_there_never_goes_to_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(TrainError, match="there is no model at"):
        find_base(name)


def test_a_hub_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(TrainError, match="the model hub did not give it: OSError"):
        find_base("someone/model")
