"""`chaccu train` with two processes: the model of one, and an end of all when one ends."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import yaml

from chaccu.conversation import Conversation, Message
from chaccu.testing.processes import Service, start_command, wait_until
from chaccu.testing.tiny import build_llama

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Full training of a tied tiny LLaMA, whose last step two processes cannot share evenly."""
    folder = tmp_path_factory.mktemp("recipe")
    build_llama(folder / "base", tie_word_embeddings=True)
    for name, count in (("train", 27), ("held-out", 2)):
        talk = [
            Conversation(messages=(Message("user", f"What is {n}?"), Message("assistant", f"It is {n}.")), id=str(n))
            for n in range(count)
        ]
        (folder / f"{name}.jsonl").write_bytes(b"\n".join(map(msgspec.json.encode, talk)))
    values = {
        "model": str(folder / "base"),
        "data": [{"path": str(folder / "train.jsonl")}],
        "validation": [{"path": str(folder / "held-out.jsonl")}],
        "output": "unnamed",
        "method": "full",
        "precision": "fp32",
        "sequence_len": 64,
        "global_batch_size": 4,
        "learning_rate": 1e-3,
        "save_steps": 1,
        "sample_tokens": 4,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


def start(folder: Path, recipe: Path, *arguments: str) -> Service:
    return start_command(folder, ["train", str(recipe), f"output={folder / 'out'}", *arguments], environment=NO_GPU)


def children(service: Service) -> list[psutil.Process]:
    """The processes of the run, in order."""
    found = [child for child in psutil.Process(service.pid).children(recursive=True) if "RANK" in environment(child)]
    return sorted(found, key=lambda child: environment(child)["RANK"])


def environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:  # It has just ended, or has not yet begun.
        return {}


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_two_processes_leave_the_model_of_one(recipe: Path, tmp_path: Path) -> None:
    outputs, logs = [], []
    for count in (1, 2):
        folder = tmp_path / str(count)
        service = start(folder, recipe, f"processes={count}", "--json")
        assert service.wait(240) == 0, service.log
        outputs.append(folder / "out")
        logs.append([line for line in service.log.splitlines() if line.startswith("{")])
    assert [len(lines) for lines in logs] == [1, 1]
    alone, shared = (json.loads(lines[0]) for lines in logs)
    assert [step["loss"] for step in shared["log"]] == pytest.approx([step["loss"] for step in alone["log"]], rel=1e-5)
    assert shared["loss_after"] == pytest.approx(alone["loss_after"], rel=1e-5)
    assert shared["samples"] == alone["samples"]
    assert {path.name for path in outputs[1].rglob("*")} == {path.name for path in outputs[0].rglob("*")}
    assert (outputs[1] / "model.safetensors").stat().st_size == (outputs[0] / "model.safetensors").stat().st_size
    ids = torch.arange(24)[None]
    logits = [load(output)(input_ids=ids).logits for output in outputs]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-3)
    snapshots = sorted(outputs[1].with_name("out.snapshots").iterdir())
    assert torch.equal(load(snapshots[-1])(input_ids=ids).logits, logits[1])


def load(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder))
    assert type(model).__name__ == "LlamaForCausalLM"
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    return model


@pytest.mark.slow
def test_when_one_process_is_killed_all_end_and_it_is_named(recipe: Path, tmp_path: Path) -> None:
    service = start(tmp_path, recipe, "processes=2", "num_train_epochs=100000", "save_steps=null")
    # The run's folder appears when it is about to take steps.
    wait_until(lambda: any(tmp_path.glob("out*")), service, timeout_s=240)
    both = children(service)
    assert len(both) == 2
    both[1].send_signal(signal.SIGKILL)
    assert service.wait(60) == 1, service.log
    assert "chaccu: process 1 of 2 was ended by SIGKILL" in service.log
    assert "Traceback" not in service.log
    assert all(map(has_ended, both))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_no_process_is_left_when_the_command_is_ended(number: signal.Signals, code: int, recipe: Path, tmp_path: Path) -> None:
    service = start(tmp_path, recipe, "processes=2", "num_train_epochs=100000", "save_steps=null")
    wait_until(lambda: len(children(service)) == 2, service, timeout_s=120)
    both = children(service)
    wait_until(lambda: any(tmp_path.glob("out*")), service, timeout_s=240)
    service.signal(number)
    assert service.wait(60) == code, service.log
    deadline_s = time.monotonic() + 20
    while not all(map(has_ended, both)):
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


@pytest.mark.slow
def test_what_stops_one_process_is_said_once(recipe: Path, tmp_path: Path) -> None:
    service = start(tmp_path, recipe, "processes=2", "max_skipped_steps=1", "learning_rate=1e30", "warmup_ratio=0")
    assert service.wait(240) == 1
    said = [line for line in service.log.splitlines() if line.startswith("chaccu: ")]
    assert len(said) == 1
    assert re.match(r"chaccu: process [01] of 2: step 2: loss .*, gradient norm nan", said[0])
    assert (tmp_path / "out.failed-batch.jsonl").is_file()
