"""Whether serving leaks: many streams at once for minutes, over a gateway and two workers on the scripted engine.

Every answer is compared with the first to the same question. One client in ten leaves in the middle, one in ten asks for a
whole answer. Sampled every second of each process: resident bytes, sockets, and tasks of its event loop, which the processes
report themselves (`--child` starts them so). Writes `results/serving-soak.json`, and on the way what there is by then; its
`is_complete` says so. Ctrl-C or SIGTERM ends it early: the clients finish the answers that they have, and what there is counts.
Exits with 1 when an answer failed or was wrong, or when sockets or tasks are left once the last client has gone.

    python benchmarks/bench_serving_soak.py                     # ten minutes, 200 streams
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
from machine import RESULTS, describe_machine

from chaccu.artifact import atomic_file

MODEL = "twin"
QUESTIONS = 50
TOKENS = 60
START_S = 60.0
CALM_S = 2.0


class Watched:
    """A `chaccu` command that reports the tasks of its event loop."""

    def __init__(self, folder: Path, name: str, arguments: list[str]) -> None:
        self.name = name
        self._tasks_file = folder / f"{name}.tasks"
        self._log = (folder / f"{name}.log").open("wb")
        command = [sys.executable, __file__, "--child", str(self._tasks_file), *arguments]
        # A group of its own: Ctrl-C in the terminal ends the clients first.
        self.process = subprocess.Popen(command, stdout=self._log, stderr=self._log, stdin=subprocess.DEVNULL, process_group=0)

    def sample(self) -> dict[str, int]:
        """Resident bytes, sockets and tasks, now."""
        proc = Path(f"/proc/{self.process.pid}")
        status = (proc / "status").read_text(encoding="utf-8").splitlines()
        resident = 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
        sockets = 0
        for file in (proc / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed just now
                sockets += str(file.readlink()).startswith("socket:")
        tasks = self._tasks_file.read_text(encoding="utf-8") if self._tasks_file.exists() else "0"
        return {"resident_bytes": resident, "sockets": sockets, "tasks": int(tasks)}

    def stop(self) -> None:
        """SIGTERM, and wait."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()


def run_child(tasks_file: Path, arguments: list[str]) -> None:
    """The command in `arguments`, which writes the number of its tasks to `tasks_file` twice a second."""
    run = asyncio.Runner.run

    async def report() -> None:
        while True:
            temporary = tasks_file.with_suffix(".new")
            temporary.write_text(str(len(asyncio.all_tasks()) - 1), encoding="utf-8")
            temporary.replace(tasks_file)
            await asyncio.sleep(0.5)

    async def both(main: Any) -> Any:
        reporting = asyncio.create_task(report())
        try:
            return await main
        finally:
            reporting.cancel()

    def run_with_report(runner: asyncio.Runner, coro: Any, **more: Any) -> Any:
        return run(runner, both(coro), **more)

    asyncio.Runner.run = run_with_report  # type: ignore[method-assign]
    from chaccu.cli.main import main

    sys.argv = ["chaccu", *arguments]
    main()


class Load:
    """`streams` clients that ask one question after another until `stop_s` (monotonic)."""

    def __init__(self, url: str, streams: int, stop_s: float) -> None:
        self._url = f"{url}/v1/chat/completions"
        self._streams = streams
        self._stop_s = stop_s
        self._texts: dict[str, str] = {}
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    def stop(self) -> None:
        """Ask nothing more."""
        self._stop_s = time.monotonic()

    async def run(self) -> None:
        """Ask until the time is up."""
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=60)) as session:
            await asyncio.gather(*(self._client(session, random.Random(index)) for index in range(self._streams)))

    async def _client(self, session: aiohttp.ClientSession, draws: random.Random) -> None:
        # Not all in one instant: the streams should be at different places.
        await asyncio.sleep(draws.random())
        while time.monotonic() < self._stop_s:
            kind = draws.choices(["streamed", "whole", "left"], [8, 1, 1])[0]
            question = f"question {draws.randrange(QUESTIONS)}"
            body = {"model": MODEL, "messages": [{"role": "user", "content": question}], "stream": kind != "whole"}
            try:
                async with session.post(self._url, json=body) as response:
                    response.raise_for_status()
                    text = await self._read(response, kind, leave_after=draws.randrange(TOKENS))
            except (aiohttp.ClientError, TimeoutError, KeyError, ValueError) as error:
                kind, text = "failed", None
                self.wrong.append(f"{question}: {type(error).__name__}: {error}")
            self.counts[kind] += 1
            if text is not None and text != self._texts.setdefault(question, text):
                self.counts["wrong"] += 1
                self.wrong.append(f"{question}: {text[:200]}")

    async def _read(self, response: aiohttp.ClientResponse, kind: str, leave_after: int) -> str | None:
        """The answer's text; None of one that was left."""
        if kind == "whole":
            content: str = (await response.json())["choices"][0]["message"]["content"]
            return content
        pieces: list[str] = []
        async for line in response.content:
            if line.startswith(b"data: {"):
                pieces.append(json.loads(line[6:])["choices"][0]["delta"].get("content", ""))
            if kind == "left" and len(pieces) > leave_after:
                response.close()
                return None
        return "".join(pieces)


@contextlib.contextmanager
def serving(folder: Path, tokens_per_s: float) -> Iterator[tuple[str, list[Watched]]]:
    """A gateway with two workers: its URL, and the three processes."""
    watched = [Watched(folder, "gateway", ["gateway", "--port", "0", "--port-file", str(folder / "url")])]
    try:
        wait_until(lambda: (folder / "url").is_file(), watched)
        url = (folder / "url").read_text(encoding="utf-8").strip()
        model = f"scripted:{MODEL}?tokens={TOKENS}&tokens_per_s={tokens_per_s}&slots=256"
        watched += [Watched(folder, f"worker-{n}", ["worker", "--model", model, "--gateway", url]) for n in (1, 2)]
        wait_until(lambda: all("ready" in (folder / f"worker-{n}.log").read_text() for n in (1, 2)), watched)
        yield url, watched
    finally:
        for one in reversed(watched):
            one.stop()


def wait_until(condition: Any, watched: list[Watched]) -> None:
    """Wait for `condition`. Raises `RuntimeError` when a process has ended or time is up."""
    deadline_s = time.monotonic() + START_S
    while not condition():
        ended = [one.name for one in watched if one.process.poll() is not None]
        if ended or time.monotonic() > deadline_s:
            raise RuntimeError(f"{', '.join(ended) or 'a process'} did not start")
        time.sleep(0.05)


async def soak(
    url: str,
    watched: list[Watched],
    streams: int,
    seconds: float,
    keep: Callable[[dict[str, Any]], None],
    keep_every_s: float,
) -> dict[str, Any]:
    """What was answered and what was sampled; `keep` gets what there is by then, every `keep_every_s`."""
    await asyncio.sleep(1.0)
    before = {one.name: one.sample() for one in watched}
    begun_s = time.monotonic()
    load = Load(url, streams, begun_s + seconds)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, load.stop)
    running = asyncio.create_task(load.run())
    series: dict[str, list[dict[str, int]]] = {one.name: [] for one in watched}

    def tell(*, is_complete: bool) -> dict[str, Any]:
        """What there is now. A process that goes on is `after` what it is in the midst of."""
        processes = {one.name: summarise(before[one.name], series[one.name], one.sample()) for one in watched}
        return {
            "minutes": round((ended_s - begun_s) / 60, 2),
            "is_complete": is_complete,
            "answers": dict(load.counts),
            "wrong": load.wrong[:10],
            "processes": processes,
        }

    kept_s = begun_s
    while not running.done():
        for one in watched:
            series[one.name].append(one.sample())
        await asyncio.wait([running], timeout=1.0)
        ended_s = time.monotonic()
        if ended_s - kept_s >= keep_every_s:
            kept_s = ended_s
            keep(tell(is_complete=False))
    running.result()
    await asyncio.sleep(CALM_S)
    return tell(is_complete=ended_s - begun_s >= seconds)


def summarise(before: dict[str, int], series: list[dict[str, int]], after: dict[str, int]) -> dict[str, Any]:
    """Before, while it went on (the first fifth left out: it warms up), and after."""
    steady = series[len(series) // 5 :]
    half = len(steady) // 2
    resident = [sample["resident_bytes"] for sample in steady]
    return {
        "before": before,
        "after": after,
        "most": {key: max(sample[key] for sample in series) for key in before},
        "resident_bytes_first_half": round(statistics.mean(resident[:half] or resident)),
        "resident_bytes_second_half": round(statistics.mean(resident[half:])),
        "resident_bytes_each_10_s": [sample["resident_bytes"] for sample in series[::10]],
    }


def find_leaks(result: dict[str, Any]) -> list[str]:
    """What is wrong, in words."""
    answers = result["answers"]
    found = [f"{answers[kind]} answers {kind}" for kind in ("failed", "wrong") if answers.get(kind)]
    for name, process in result["processes"].items():
        for key in ("sockets", "tasks"):
            left = process["after"][key] - process["before"][key]
            if left > 0:
                found.append(f"{name} has {left} {key} more than before")
    return found


def main() -> int:
    """Measure, print and write."""
    if sys.argv[1:2] == ["--child"]:
        run_child(Path(sys.argv[2]), sys.argv[3:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--tokens-per-s", type=float, default=10.0, help="of each stream")
    parser.add_argument("--write-every", type=float, default=10.0, help="seconds between two writings of the results")
    parser.add_argument("--out", type=Path, default=RESULTS / "serving-soak.json")
    arguments = parser.parse_args()
    described = {
        "machine": describe_machine("starlette", "uvicorn", "websockets", "aiohttp"),
        "streams": arguments.streams,
        "tokens_per_s_of_a_stream": arguments.tokens_per_s,
    }
    arguments.out.parent.mkdir(exist_ok=True)

    def keep(result: dict[str, Any]) -> None:
        with atomic_file(arguments.out) as file:
            file.write(json.dumps({**described, **result}, indent=2).encode() + b"\n")

    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder), arguments.tokens_per_s) as (url, watched),
    ):
        result = asyncio.run(soak(url, watched, arguments.streams, 60 * arguments.minutes, keep, arguments.write_every))
    keep(result)
    print(json.dumps({**described, **result}, indent=2))
    leaks = find_leaks(result)
    print("; ".join(leaks) or "nothing has leaked", file=sys.stderr)
    return 1 if leaks else 0


if __name__ == "__main__":
    sys.exit(main())
