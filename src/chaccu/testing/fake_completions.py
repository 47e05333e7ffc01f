"""`FakeCompletions`: a server of `/v1/completions` over the scripted engine, and the same as a stand-in for `vllm serve`.

Invariants: it takes ids or text as it is told, one byte a token; every body that it got is kept; a prompt that ends with a part
of an answer is gone on with. It ignores chat without functions, and sampling but for the seed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from chaccu.engine.protocol import ContextOverflowError, GenerationRequest
from chaccu.engine.scripted import ScriptedEngine, build_byte_tokenizer, parse_script
from chaccu.testing.fake_tool_calls import chat_events
from chaccu.testing.http_thread import HttpThread

Fault = Literal["refuse", "event", "cut", "unfinished", "exit"]
_FAULTY_TOKENS = 3
_WORDS = "failed in /opt/server/engine/core.py: no memory"
_SOURCES = Path(__file__).parents[2]


class FakeCompletions(HttpThread):
    """The server, in a thread. Use it as a context manager; `url` is what comes before `/completions`.

    `fault` happens after some tokens of an answer, "refuse" before. With `takes_tools` it answers chats with functions too.
    """

    def __init__(
        self,
        spec: str,
        *,
        name: str = "parrot",
        owned_by: str = "",
        key: str = "",
        takes_ids: bool = True,
        adapters: Sequence[str] = (),
        takes_tools: bool = False,
        port: int = 0,
    ) -> None:
        self.name = name
        self.adapters = adapters
        self.owned_by = owned_by
        self.key = key
        self.takes_ids = takes_ids
        self.takes_tools = takes_tools
        self.fault: Fault | None = None
        self.requests: list[dict[str, Any]] = []
        self.cancelled = 0
        script = parse_script(spec)
        self._text = script.text
        self._context_tokens = script.context_tokens
        self._engine = ScriptedEngine(script)
        self._tokenizer = build_byte_tokenizer()
        self._prompts: list[list[int]] = []
        routes = [
            Route("/health", self._health),
            Route("/v1/models", self._list_models),
            Route("/v1/completions", self._complete, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        super().__init__(routes, port)
        self.url = f"{self.root}/v1"

    async def _health(self, request: Request) -> Response:
        return PlainTextResponse("")

    async def _list_models(self, request: Request) -> Response:
        if not self._is_known(request):
            return _error(401, "the key is not known")
        model = {"id": self.name, "object": "model", "owned_by": self.owned_by, "max_model_len": self._context_tokens}
        adapters = [{**model, "id": name, "parent": self.name} for name in self.adapters]
        return JSONResponse({"object": "list", "data": [model, *adapters]})

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append(body)
        if not self._is_known(request):
            return _error(401, "the key is not known")
        if body["model"] not in (self.name, *self.adapters):
            return _error(404, f"the model {body['model']} does not exist")
        if isinstance(body["prompt"], list) and not self.takes_ids:
            return _error(400, "prompt must be a string")
        if self.fault == "refuse":
            return _error(500, _WORDS)
        asked = self._read(body)
        if not body.get("stream"):
            deltas = [delta async for delta in self._engine.generate(asked)]
            text, usage = "".join(delta.text for delta in deltas), _count(asked, sum(delta.tokens for delta in deltas))
            return JSONResponse({"choices": [{"text": text, "finish_reason": deltas[-1].finish_reason}], "usage": usage})
        return StreamingResponse(self._events(asked, body), media_type="text/event-stream")

    async def _chat(self, request: Request) -> Response:
        if not self.takes_tools:
            return _error(400, "no functions are taken")
        body = await request.json()
        self.requests.append(body)
        if any("wrong" in tool["function"]["name"] for tool in body["tools"]):
            return _error(400, "the function is wrong, says /opt/server/tools.py")
        if not body.get("stream"):
            return JSONResponse({"choices": [], "usage": {}})
        return StreamingResponse(self._chat_events(body), media_type="text/event-stream")

    async def _chat_events(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        try:
            async for event in chat_events(body):
                yield _event(event)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        yield b"data: [DONE]\n\n"

    def _is_known(self, request: Request) -> bool:
        return not self.key or request.headers.get("authorization") == f"Bearer {self.key}"

    def _read(self, body: dict[str, Any]) -> GenerationRequest:
        prompt = body["prompt"]
        ids: list[int] = prompt if isinstance(prompt, list) else self._tokenizer.encode_texts([prompt], first=[False])[0]
        begun = self._find_begun(ids)
        prompt_ids = ids[: len(ids) - begun]
        self._prompts.append(prompt_ids)
        return GenerationRequest(
            id="fake",
            prompt_ids=prompt_ids,
            reply_ids=ids[len(ids) - begun :],
            max_tokens=body["max_tokens"],
            seed=body.get("seed"),
            stop=tuple(body.get("stop", ())),
        )

    def _find_begun(self, ids: list[int]) -> int:
        """How many ids at the end are of an answer: a beginning of the set text, or what follows a prompt seen before."""
        if self._text is not None:
            answer = self._tokenizer.encode_texts([self._text], first=[False])[0]
            return next((n for n in range(len(answer), 0, -1) if ids[-n:] == answer[:n]), 0)
        return max((len(ids) - len(seen) for seen in self._prompts if ids[: len(seen)] == seen), default=0)

    async def _events(self, asked: GenerationRequest, body: dict[str, Any]) -> AsyncIterator[bytes]:
        made = 0
        reason = "stop"
        try:
            if len(body.get("stop_token_ids", ())) >= self._tokenizer.vocab_size - 2:  # any token stops
                made = 1
            else:
                async for delta in self._engine.generate(asked):
                    made += delta.tokens
                    reason = delta.finish_reason or reason
                    choice = {"index": 0, "text": delta.text, "finish_reason": None}
                    usage = _count(asked, made) if body["stream_options"].get("continuous_usage_stats") else None
                    yield _event({"choices": [choice], "usage": usage})
                    if self.fault is not None and made >= _FAULTY_TOKENS:
                        if self.fault == "exit":
                            os._exit(9)
                        if self.fault == "event":
                            yield _event({"error": {"message": _WORDS, "code": 500}})
                        if self.fault == "cut":
                            raise ConnectionResetError
                        return
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        except ContextOverflowError as error:
            yield _event({"error": {"message": error.message}})
            return
        yield _event({"choices": [{"index": 0, "text": "", "finish_reason": reason}]})
        yield _event({"choices": [], "usage": _count(asked, made)})
        yield b"data: [DONE]\n\n"


def write_fake_vllm(folder: Path, spec: str, *, name: str = "vllm") -> Path:
    """Write an executable that answers as `vllm serve` does, with the answers of `spec`; returns its path.

    Flags of its own: `--fail-at-start`; `--die-once FILE`, in the middle of an answer if FILE is not there; `--pids FILE` for
    its process id and that of a child of its own.
    """
    file = folder / name
    file.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(_SOURCES)!r})\n"
        f"from chaccu.testing.fake_completions import run_fake_vllm\nrun_fake_vllm({spec!r}, sys.argv[1:])\n",
        encoding="utf-8",
    )
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


def run_fake_vllm(spec: str, arguments: Sequence[str]) -> None:
    """What the executable does."""
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model", type=Path)
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--served-model-name")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--enable-lora", action="store_true")
    parser.add_argument("--lora-modules", nargs="+", default=[])
    parser.add_argument("--enable-auto-tool-choice", action="store_true")
    parser.add_argument("--fail-at-start", action="store_true")
    parser.add_argument("--die-once", type=Path)
    parser.add_argument("--pids", type=Path)
    given = parser.parse_args(arguments)
    if given.fail_at_start:
        sys.exit("loading the weights\nValueError: no kernel image for this device")
    if given.pids is not None:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        given.pids.write_text(json.dumps([os.getpid(), child.pid]), encoding="utf-8")
    key = os.environ["VLLM_API_KEY"]
    adapters = [module.partition("=")[0] for module in given.lora_modules]
    takes_tools: bool = given.enable_auto_tool_choice
    with FakeCompletions(
        spec,
        name=given.served_model_name,
        owned_by="vllm",
        key=key,
        adapters=adapters,
        takes_tools=takes_tools,
        port=given.port,
    ) as server:
        if given.die_once is not None and not given.die_once.exists():
            given.die_once.touch()
            server.fault = "exit"
        with contextlib.suppress(KeyboardInterrupt):
            server.wait()


def _count(asked: GenerationRequest, made: int) -> dict[str, int]:
    read = len(asked.prompt_ids) + len(asked.reply_ids)
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


def _event(fields: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "error", "code": status}}, status_code=status)
