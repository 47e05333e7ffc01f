"""`AdapterSource`: what NAME=FOLDER on the command line of a worker stands for: a LoRA adapter to be served over a base.

Accepted: the output folder of `chaccu train` and any folder that peft wrote (adapter_config.json with
adapter_model.safetensors), and what `chaccu weights adapter-gguf` makes of it (adapter.gguf). Invariant: an adapter whose
manifest names another base, or another tokenizer, is refused. It ignores what an engine does with it.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from chaccu.artifact import MANIFEST_NAME, read_manifest
from chaccu.engine.model_source import ModelSource
from chaccu.errors import EngineError, UsageError
from chaccu.lineage import check_base

ADAPTER_GGUF = "adapter.gguf"
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")


class AdapterSource(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter that is there: the `name` to serve it under, and what it holds.

    `gguf`: an adapter's GGUF file; `peft`: a folder of peft's; one of them is there. `chat_format`: what its manifest names,
    None where that of the base holds.
    """

    name: str
    folder: Path
    gguf: Path | None = None
    peft: Path | None = None
    chat_format: str | None = None


def parse_adapter(text: str) -> tuple[str, Path]:
    """NAME=FOLDER. Raises `UsageError` when it is not written so."""
    name, equals, folder = text.partition("=")
    if not (equals and name and folder):
        raise UsageError(f"{text!r} names no adapter.", remedy="--adapter NAME=FOLDER")
    return name, Path(folder).expanduser()


def resolve_adapter(name: str, folder: Path, base: ModelSource) -> AdapterSource:
    """Find the adapter in `folder`, for the model `base`.

    Raises `EngineError` when none is there, `WeightsError` when its manifest names another base or another tokenizer,
    `ArtifactError` for a damaged manifest.
    """
    gguf = folder / ADAPTER_GGUF
    has_gguf, has_peft = gguf.is_file(), all((folder / file).is_file() for file in PEFT_FILES)
    if not (has_gguf or has_peft):
        raise EngineError(
            f"{folder} holds no LoRA adapter: neither {' with '.join(PEFT_FILES)} nor {ADAPTER_GGUF}.",
            remedy="name the output folder of chaccu train, or of chaccu weights adapter-gguf",
        )
    chat_format = None
    if (folder / MANIFEST_NAME).is_file():
        manifest = read_manifest(folder, kind="adapter")
        if manifest.facts.get("config_changes"):
            raise EngineError(
                f"{folder} was trained with positions stretched, which a base that serves others beside it cannot have.",
                remedy="merge it: chaccu weights merge",
            )
        chat_format = manifest.chat_format
        if base.folder is not None:
            check_base(base.folder, folder, gguf=base.gguf)
    return AdapterSource(
        name=name,
        folder=folder,
        gguf=gguf if has_gguf else None,
        peft=folder if has_peft else None,
        chat_format=chat_format,
    )
