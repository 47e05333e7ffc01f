"""Names of engines, loaded lazily, and the choice among them.

Invariant: naming an engine imports nothing but its own file. `auto` chooses by what the model holds and what is installed, and
says why.
"""

from __future__ import annotations

from importlib import import_module, util
from types import MappingProxyType
from typing import cast

from chaccu.engine.model_source import ModelSource
from chaccu.engine.protocol import Engine
from chaccu.errors import EngineError, MissingDependencyError, UsageError, did_you_mean

AUTO = "auto"
_ENGINES = MappingProxyType(
    {
        "llamacpp": "chaccu.engine.llamacpp:LlamaCppEngine",
        "scripted": "chaccu.engine.scripted:ScriptedEngine",
        "transformers": "chaccu.engine.transformers:TransformersEngine",
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


def choose_engine(source: ModelSource, wanted: str = AUTO) -> tuple[str, str]:
    """The engine for `source` and the reason for it.

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
    if source.gguf is not None and (source.hf is None or _installed("xllamacpp")):
        if not _installed("xllamacpp"):
            raise MissingDependencyError("xllamacpp", extra="cpu-engine", needed_for=f"serving {source.gguf.name}")
        return "llamacpp", f"it holds {source.gguf.name}, a GGUF file"
    if not (_installed("torch") and _installed("transformers")):
        raise MissingDependencyError("torch with transformers", extra="train", needed_for=f"serving {source.spec}")
    return "transformers", "it holds config.json with safetensors"


def _check_fits(source: ModelSource, name: str) -> None:
    fits = {"scripted": source.is_scripted, "llamacpp": source.gguf is not None, "transformers": source.hf is not None}[name]
    if not fits:
        needs = {
            "scripted": "a model named scripted:NAME",
            "llamacpp": "a .gguf file",
            "transformers": "config.json with *.safetensors",
        }
        raise EngineError(
            f"the engine {name} needs {needs[name]}; {source.spec} is none.", remedy="--engine auto chooses by the weights"
        )


def _installed(module: str) -> bool:
    return util.find_spec(module) is not None
