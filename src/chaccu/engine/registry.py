"""Names of engines, loaded lazily, and the choice among them.

Invariant: naming an engine imports nothing but its own file. `auto` chooses by what the model holds and what is installed, and
says why.
"""

from __future__ import annotations

from importlib import import_module, util
from pathlib import Path
from types import MappingProxyType
from typing import cast

from chaccu.engine.model_source import ModelSource
from chaccu.engine.protocol import Engine
from chaccu.errors import EngineError, MissingDependencyError, UsageError, did_you_mean

AUTO = "auto"
_ENGINES = MappingProxyType(
    {
        "llamacpp": "chaccu.engine.llamacpp:LlamaCppEngine",
        "openai": "chaccu.engine.openai:OpenAIEngine",
        "scripted": "chaccu.engine.scripted:ScriptedEngine",
        "transformers": "chaccu.engine.transformers:TransformersEngine",
        "vllm": "chaccu.engine.vllm:VllmEngine",
    }
)


def list_engines() -> list[str]:
    """Names of the engines, sorted, without `auto`."""
    return sorted(_ENGINES)


def load_engine(name: str) -> type[Engine]:
    """The engine class called `name`. Raises `UsageError` with the nearest names when there is none."""
    target = _ENGINES.get(name)
    if target is None:
        raise UsageError(f"there is no engine {name!r}.", remedy=did_you_mean(name, [*_ENGINES, AUTO]))
    module, _, attribute = target.partition(":")
    return cast(type[Engine], getattr(import_module(module), attribute))


def choose_engine(source: ModelSource, wanted: str = AUTO, *, program: str | None = None) -> tuple[str, str]:
    """The engine for `source` and the reason for it; `program` is the vLLM to look for.

    Raises `UsageError` for an unknown engine, `EngineError` for one that cannot read these weights, `MissingDependencyError`
    when what these weights need is not installed.
    """
    if wanted != AUTO:
        if wanted not in _ENGINES:
            raise UsageError(f"there is no engine {wanted!r}.", remedy=did_you_mean(wanted, [*_ENGINES, AUTO]))
        _check_fits(source, wanted)
        return wanted, "it was asked for"
    if source.is_scripted:
        return "scripted", f"{source.spec} is a scripted model"
    if source.url is not None:
        return "openai", "a server has the model"
    if source.gguf is not None and (source.hf is None or _installed("xllamacpp")):
        if not _installed("xllamacpp"):
            raise MissingDependencyError("xllamacpp", extra="cpu-engine", needed_for=f"serving {source.gguf.name}")
        return "llamacpp", f"it holds {source.gguf.name}, a GGUF file"
    return _choose_for_safetensors(source, program)


def _choose_for_safetensors(source: ModelSource, program: str | None) -> tuple[str, str]:
    from chaccu.engine.vllm import find_vllm

    held = "it holds config.json with safetensors"
    without = "there is no CUDA GPU for vllm"
    if _has_cuda_gpu():
        if find_vllm(program) is not None:
            return "vllm", f"{held}, and there are a CUDA GPU and vLLM"
        without = "vLLM is not installed"
    if not (_installed("torch") and _installed("transformers")):
        raise MissingDependencyError("torch with transformers", extra="train", needed_for=f"serving {source.spec}")
    return "transformers", f"{held}; {without}"


_NEEDS = MappingProxyType(
    {
        "llamacpp": "a .gguf file",
        "openai": "--url, where a server has the model",
        "scripted": "a model named scripted:NAME",
        "transformers": "config.json with *.safetensors",
        "vllm": "config.json with *.safetensors",
    }
)


def _check_fits(source: ModelSource, name: str) -> None:
    fits = {
        "llamacpp": source.gguf is not None,
        "openai": source.url is not None,
        "scripted": source.is_scripted,
        "transformers": source.hf is not None,
        "vllm": source.hf is not None,
    }[name]
    if not fits:
        raise EngineError(
            f"the engine {name} needs {_NEEDS[name]}; {source.spec} is none.", remedy="--engine auto chooses by the weights"
        )


def _installed(module: str) -> bool:
    return util.find_spec(module) is not None


def _has_cuda_gpu() -> bool:
    """By the driver's devices: torch is not loaded for it, and need not be installed beside vLLM."""
    return any(Path("/dev").glob("nvidia[0-9]*"))
