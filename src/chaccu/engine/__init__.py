"""Weights to a token stream: the `Engine` protocol, one file an engine, and the registry that names them."""

from chaccu.engine.adapter_source import AdapterSource, parse_adapter, resolve_adapter
from chaccu.engine.model_source import ModelSource, resolve_model
from chaccu.engine.protocol import (
    AdapterEngine,
    ContextOverflowError,
    Engine,
    EngineInfo,
    EngineLostError,
    EngineOptions,
    GenerationDelta,
    GenerationRequest,
    TokenLogprob,
    Usage,
    WatchedEngine,
    WrongRequestError,
)
from chaccu.engine.registry import choose_engine, list_engines, load_engine

__all__ = [
    "AdapterEngine",
    "AdapterSource",
    "ContextOverflowError",
    "Engine",
    "EngineInfo",
    "EngineLostError",
    "EngineOptions",
    "GenerationDelta",
    "GenerationRequest",
    "ModelSource",
    "TokenLogprob",
    "Usage",
    "WatchedEngine",
    "WrongRequestError",
    "choose_engine",
    "list_engines",
    "load_engine",
    "parse_adapter",
    "resolve_adapter",
    "resolve_model",
]
