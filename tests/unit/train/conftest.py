"""Recipes over tiny models, and conversations to train them on."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import msgspec
import pytest

from chaccu.conversation import Conversation, Message
from chaccu.testing.tiny import build_llama
from chaccu.train.recipe import DataSource, Recipe

COLOURS = ("red", "green", "blue", "white")
THINGS = ("sky", "grass", "sea", "snow", "llama", "egg")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers", reason="transformers is not installed")
    return build_llama(tmp_path_factory.mktemp("base") / "tiny-llama")


@pytest.fixture(scope="session")
def kernel_device() -> str:
    """Where Triton kernels run: a GPU, or with TRITON_INTERPRET=1 and Triton installed, the processor."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if torch.cuda.is_available():
        return "cuda"
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        return "cpu"
    pytest.skip("needs a CUDA GPU, or Triton and TRITON_INTERPRET=1")


@pytest.fixture
def recipe(llama: Path, tmp_path: Path) -> Recipe:
    """LoRA on the tiny LLaMA: four rows of talk about colours, and two more conversations held out."""
    talk = [_ask(f"What colour is the {thing}?", f"The {thing} is {colour}.") for thing in THINGS for colour in COLOURS]
    return Recipe(
        model=str(llama),
        data=[_write(tmp_path / "train.jsonl", talk[:-2])],
        validation=[_write(tmp_path / "held-out.jsonl", talk[-2:])],
        output=str(tmp_path / "out"),
        sequence_len=256,
        learning_rate=1e-2,
        num_train_epochs=3,
        precision="fp32",
    )


def _ask(question: str, answer: str) -> Conversation:
    return Conversation(messages=(Message("user", question), Message("assistant", answer)), id=answer)


def _write(path: Path, conversations: list[Conversation]) -> DataSource:
    path.write_bytes(b"\n".join(map(msgspec.json.encode, conversations)))
    return DataSource(path=str(path))
