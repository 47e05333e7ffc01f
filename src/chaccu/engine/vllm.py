"""The vllm engine: `vllm serve` as a child process, from an environment of its own if that is named.

Invariants: the child listens on loopback at a port picked for it, with a random key that it gets by its environment; it is
ready before `load` returns, and dies with this process, whatever ends it. When the child dies the engine is lost, and the
worker starts it again. Flags behind `--` go to vLLM as they are: tensor and pipeline parallelism, several machines on Ray,
prefix caching, adapters, speculative decoding are its own.

It ignores vLLM's Python interface and its version: all is done by its command line and its HTTP API.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import socket
import sys
import time
import urllib.request
from importlib import util
from pathlib import Path

import msgspec

from chaccu.conversation import TextTokenizer
from chaccu.engine.completions import CompletionsServer
from chaccu.engine.guarded_child import GuardedChild
from chaccu.engine.model_source import ModelSource
from chaccu.engine.protocol import EngineInfo, EngineLostError, EngineOptions
from chaccu.engine.server_engine import ServerEngine, describe_server
from chaccu.engine.server_text import hide_paths
from chaccu.errors import EngineError, MissingDependencyError

_DEFAULT_SLOTS = 64
_POLL_S = 0.1
_HEALTH_S = 5.0


class VllmEngine(ServerEngine):
    """One model in one child."""

    def __init__(self, child: GuardedChild, server: CompletionsServer, info: EngineInfo) -> None:
        super().__init__(server, info)
        self._child = child

    @classmethod
    def load(cls, source: ModelSource, options: EngineOptions) -> VllmEngine:
        if source.hf is None or source.folder is None:
            raise EngineError(f"{source.spec} holds no config.json with *.safetensors.", remedy="name a Hugging Face folder")
        program = find_vllm(options.program)
        if program is None:
            raise MissingDependencyError(
                "vllm (or --vllm-python, where another environment has it)", extra="vllm", needed_for="the engine vllm"
            )
        port, key = _free_port(), secrets.token_urlsafe(24)
        command = [*program, "serve", str(source.hf), "--host", "127.0.0.1", "--port", str(port)]
        command += ["--served-model-name", source.name]
        if options.context_tokens is not None:
            command += ["--max-model-len", str(options.context_tokens)]
        if options.slots is not None:
            command += ["--max-num-seqs", str(options.slots)]
        child = GuardedChild([*command, *options.arguments], _environment(key, options.program))
        tokenizer = TextTokenizer.load(source.folder)
        server = CompletionsServer(f"http://127.0.0.1:{port}/v1", source.name, key, tokenizer, counts_tokens=True, who="vLLM")
        try:
            _wait_until_healthy(child, port)
            server.meet()
            if not server.takes_ids:
                raise EngineError("this vLLM takes no token ids as a prompt.", remedy="install a newer one")
        except BaseException:
            child.close()
            raise
        info = describe_server(server, options, engine="vllm", default_slots=_DEFAULT_SLOTS, device="cuda")
        return cls(child, server, msgspec.structs.replace(info, adapters=server.adapters))

    def check(self) -> None:
        """Raise `EngineLostError` when the child has ended."""
        if self._child.exit_code is not None:
            raise EngineLostError(f"vLLM ended with exit code {self._child.exit_code}: {hide_paths(self._child.last_words())}")

    async def close(self) -> None:
        await super().close()
        await asyncio.to_thread(self._child.close)


def find_vllm(program: str | None = None) -> list[str] | None:
    """The beginning of vLLM's command line; None where there is none.

    `program`: a Python that has vLLM, or vLLM's own executable; by default the one on PATH, or the package installed here.
    """
    if program is not None:
        found = shutil.which(program)
        if found is None:
            return None
        return _of_python(found) if Path(found).name.startswith("python") else [found]
    executable = shutil.which("vllm")
    if executable is not None:
        return [executable]
    return _of_python(sys.executable) if util.find_spec("vllm") is not None else None


def _of_python(python: str) -> list[str]:
    return [python, "-m", "vllm.entrypoints.cli.main"]


def _environment(key: str, program: str | None) -> dict[str, str]:
    """Ours, with the key, without our secrets, and without what would make another environment's Python load our packages."""
    foreign = () if program is None else ("PYTHONPATH", "PYTHONHOME")
    kept = {name: value for name, value in os.environ.items() if name not in foreign and not name.startswith("CHACCU_")}
    return {**kept, "VLLM_API_KEY": key}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _wait_until_healthy(child: GuardedChild, port: int) -> None:
    """However long it loads. Raises `EngineError` with the child's last words when it ends."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        if child.exit_code is not None:
            raise EngineError(
                f"vLLM ended with exit code {child.exit_code} before it was ready; its last words: "
                f"{child.last_words() or '(none)'}",
                remedy="look at its messages above, and at the flags behind --",
            )
        try:
            with opener.open(f"http://127.0.0.1:{port}/health", timeout=_HEALTH_S):
                return
        except OSError:  # not listening yet, or not ready
            time.sleep(_POLL_S)
