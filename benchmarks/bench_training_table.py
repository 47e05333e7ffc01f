"""The training table of the machine it runs on: each documented configuration beside its bar, and other trainers beside them.

    python benchmarks/bench_training_table.py --data rows.npz
    python benchmarks/bench_training_table.py --data rows.npz --only 7b-fp8 1b --limit-s 200
    python benchmarks/bench_training_table.py --data rows.npz --only 1b \
        --rival "python their_bench.py --shape 1b" --rival-folder ../theirs
    python benchmarks/bench_training_table.py --show

Each configuration is a `bench_train.py` in a process of its own, so that each has the whole memory; one that fails or does not
end in time is noted with its last lines. A rival is any command that prints a line
`RESULT name …: 9,000 useful tok/s, MFU 0.061, peak 47.5 GiB`; its shape is what it is given as `--shape`.

Writes `results/train-h100.json` (named after the GPU) after each of them. A new figure takes the place of that of the same
configuration, GPU, attention kernels and commit; others stay. `--show` prints what is there. Bars are those of an H100 80 GB.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from limited import Ended, hide_folders, parse_rival, run_limited
from machine import RESULTS, describe_machine, results_file, write_results

BENCH = Path(__file__).parent / "bench_train.py"
PACKAGES = ("torch", "triton", "transformers", "flash-attn-4", "torchao", "bitsandbytes")
BARS_ARE_OF = "H100"


class Bar(NamedTuple):
    """Of a configuration: useful tokens a second and share of the peak at least, gigabytes of 10⁹ bytes at most."""

    tokens_per_s: int | None = None
    mfu: float | None = None
    peak_gb: float | None = None


class Configuration(NamedTuple):
    """A run of `bench_train.py`."""

    shape: str
    tokens: int
    checkpoint: str = "none"
    method: str = "full"
    precision: str = "bf16"
    bar: Bar = Bar()

    def arguments(self) -> list[str]:
        """For the command line of `bench_train.py`."""
        named = [("shape", self.shape), ("tokens", str(self.tokens)), ("checkpoint", self.checkpoint)]
        named += [("method", self.method), ("precision", self.precision)]
        words = [word for name, value in named for word in (f"--{name}", value)]
        return [*words, "--in-backward"] if self.method == "full" else words


CONFIGURATIONS = {
    "1b": Configuration("1b", 49152, bar=Bar(78_000, 0.53)),
    "7b": Configuration("7b", 12288, bar=Bar(14_000, 0.58)),
    "7b-fp8": Configuration("7b", 16384, "selective", precision="fp8", bar=Bar(16_500)),
    "13b": Configuration("13b", 4608, "selective", bar=Bar(6_500, 0.52, 79)),
    "13b-qlora": Configuration("13b", 2048, "full", "qlora", bar=Bar(peak_gb=16)),
    "13b-qlora-8192": Configuration("13b", 8192, "full", "qlora", bar=Bar(peak_gb=16)),
}
Found = dict[str, Any]


def main() -> None:
    """Run, print and write. Exit code 1 when something that was asked for gave no figures."""
    options = parse_options()
    if options.show:
        print(format_table(read_results(options.out or RESULTS / "train-h100.json")))
        return
    # Ended from outside, what runs is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    device = ask_device(options.limit_s)
    out = options.out or results_file("train", device)
    about = {**describe_machine(*PACKAGES, commit=options.commit), "device": device}
    found = read_results(out)
    complete = True
    for name in options.only:
        command = [sys.executable, str(BENCH), "--data", str(options.data), "--steps", str(options.steps)]
        entry = measure(name, [*command, *CONFIGURATIONS[name].arguments()], about, limit_s=options.limit_s)
        complete &= keep(entry, found["runs"], out, found)
    for command in options.rival:
        entry = measure_rival(command, about, limit_s=options.limit_s, folder=options.rival_folder)
        complete &= keep(entry, found["rivals"], out, found)
    print(format_table(found, device=device))
    sys.exit(not complete)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="as for bench_train.py")
    parser.add_argument(
        "--only",
        nargs="*",
        choices=list(CONFIGURATIONS),
        default=list(CONFIGURATIONS),
        metavar="NAME",
        help=f"of {', '.join(CONFIGURATIONS)}; without a name none",
    )
    parser.add_argument("--limit-s", type=float, default=280, help="seconds for each")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rival", action="append", default=[], metavar="COMMAND")
    parser.add_argument("--rival-folder", type=Path, help="where rivals' commands run")
    parser.add_argument("--out", type=Path, help="the results file")
    parser.add_argument("--commit", help="what is measured, where the code lies outside of its repository")
    parser.add_argument("--show", action="store_true", help="print what the results file holds, and measure nothing")
    options = parser.parse_args()
    if options.data is None and options.only and not options.show:
        parser.error("--data is needed to measure")
    return options


def ask_device(limit_s: float) -> str:
    """The GPU's name. A process of its own asks, since CUDA in this one would take memory from those that are measured."""
    ask = "import torch; print(torch.cuda.get_device_name())"
    ended = run_limited([sys.executable, "-c", ask], limit_s=limit_s)
    if ended.exit_code != 0:
        raise SystemExit("\n".join(["no GPU:", *ended.last_lines]))
    return ended.last_lines[-1]


def measure(name: str, command: Sequence[str], about: Found, *, limit_s: float) -> Found:
    """One configuration, run by `command`: what it was and where, its figures or why there are none, and its bar."""
    configuration = CONFIGURATIONS[name]
    asked = {key: value for key, value in configuration._asdict().items() if key != "bar"}
    figures = parse_figures(ended) if (ended := run_limited(command, limit_s=limit_s)).exit_code == 0 else None
    entry = {"configuration": name, **about, **asked}
    entry |= figures if figures is not None else describe_failure(ended, limit_s)
    bar = {key: value for key, value in configuration.bar._asdict().items() if value is not None}
    return {**entry, "bar": bar, "met": judge(entry)}


def measure_rival(command: str, about: Found, *, limit_s: float, folder: Path | None) -> Found:
    """Another trainer's bench: what it says of itself, or why that is not known. Its folders are left out."""
    words = shlex.split(command)
    ended = run_limited(words, limit_s=limit_s, folder=folder)
    shape = next((after for word, after in pairwise(words) if word == "--shape"), None)
    entry = {"command": hide_folders(command), "shape": shape, **about}
    result = parse_rival(ended.output) if ended.exit_code == 0 else None
    if result is None:
        return {**entry, **describe_failure(ended, limit_s)}
    return {
        **entry,
        "name": result.name,
        "useful_tokens_per_s": round(result.useful_tokens_per_s),
        "mfu": result.mfu,
        "peak_gb": result.peak_gb,
    }


def parse_figures(ended: Ended) -> Found | None:
    """The JSON object that `bench_train.py` ends with, None when there is none."""
    for line in reversed(ended.output.splitlines()):
        if line.startswith("{"):
            try:
                figures = json.loads(line)
            except json.JSONDecodeError:  # something else that begins so
                continue
            if "useful_tokens_per_s" in figures:
                return dict(figures)
    return None


def describe_failure(ended: Ended, limit_s: float) -> Found:
    """Why a command gave no figures, and its last lines."""
    if ended.exit_code == 0:
        reason = "no result in its output"
    elif ended.exit_code is not None:
        reason = f"ended with exit code {ended.exit_code}"
    elif ended.wall_s < limit_s:
        reason = "did not start"
    else:
        reason = f"did not end within {limit_s:.0f} s"
    return {"failed": reason, "last_lines": ended.last_lines}


def judge(entry: Found) -> dict[str, bool]:
    """Of each part of the configuration's bar, whether it is met; empty where it was measured on another GPU, or not at all."""
    if BARS_ARE_OF not in entry["device"] or "failed" in entry:
        return {}
    bar = CONFIGURATIONS[entry["configuration"]].bar
    held: dict[str, tuple[float | None, Callable[[float], bool]]] = {
        "tokens_per_s": (bar.tokens_per_s, lambda least: entry["useful_tokens_per_s"] >= least),
        "mfu": (bar.mfu, lambda least: entry["mfu"] >= least),
        "peak_gb": (bar.peak_gb, lambda most: entry["peak_gb"] <= most),
    }
    return {name: meets(limit) for name, (limit, meets) in held.items() if limit is not None}


def read_results(path: Path) -> Found:
    """The file, or what an empty one would be."""
    empty: Found = {"runs": [], "rivals": []}
    return {**empty, **json.loads(path.read_text(encoding="utf-8"))} if path.is_file() else empty


def keep(entry: Found, entries: list[Found], path: Path, found: Found) -> bool:
    """Put an entry among its like and write the file, whole or not at all. Whether it has figures."""
    entries[:] = [one for one in entries if not replaces(entry, one)]
    entries.append(entry)
    write_results(found, path)
    print(format_failure(entry) if "failed" in entry else json.dumps(entry, ensure_ascii=False), flush=True)
    return "failed" not in entry


def replaces(new: Found, old: Found) -> bool:
    """Whether `new` is another try of `old`. A failure takes no figures' place."""
    if any(new.get(key) != old.get(key) for key in ("configuration", "command", "device", "commit")):
        return False
    return "failed" in old or ("failed" not in new and new.get("attention") == old.get("attention"))


def format_failure(entry: Found) -> str:
    """A failure and what was written last."""
    name = entry.get("configuration") or entry["command"]
    return "\n  ".join([f"{name}: {entry['failed']}", *entry["last_lines"]])


HEADS = ("shape", "method", "precision", "row", "layers recomputed", "tokens/s", "MFU", "peak GB", "bar", "met", "measured")


def format_table(found: Found, device: str | None = None) -> str:
    """Markdown: the last entry of each configuration and kernels, those of rivals after ours of their shape. `device`: of this
    one alone."""
    runs: dict[Any, Found] = {}
    for entry in found["runs"]:
        if entry.get("configuration") in CONFIGURATIONS and device in (None, entry["device"]):
            # A failure is shown as long as nothing later has figures.
            runs = {
                key: one
                for key, one in runs.items()
                if not ("failed" in one and one["configuration"] == entry["configuration"])
            }
            runs[entry["configuration"], entry["device"], entry.get("attention")] = entry
    names = list(CONFIGURATIONS)
    ours = sorted(runs.values(), key=lambda entry: names.index(entry["configuration"]))
    rows: list[tuple[str, ...]] = []
    rivals = [entry for entry in found["rivals"] if device in (None, entry["device"])]
    for place, entry in enumerate(ours):
        rows.append(format_run(entry))
        if place + 1 == len(ours) or ours[place + 1]["shape"] != entry["shape"]:
            rows += [format_rival(rival, ours) for rival in rivals if rival["shape"] == entry["shape"]]
    shapes = {entry["shape"] for entry in ours}
    rows += [format_rival(rival, ours) for rival in rivals if rival["shape"] not in shapes]
    return "\n".join(f"| {' | '.join(row)} |" for row in (HEADS, ("---",) * len(HEADS), *rows))


def format_run(entry: Found) -> tuple[str, ...]:
    """A row of the table: one of ours."""
    what = (entry["shape"], entry["method"], entry["precision"], f"{entry['tokens']:,}")
    bar, met = format_bar(entry["bar"]), ", ".join(format_met(entry["met"])) or "–"
    where = f"{entry['date']}, {entry['commit']}"
    if "failed" in entry:
        return (*what, "", entry["failed"], "", "", bar, "–", where)
    figures = (
        str(entry["layers_recomputed"]),
        f"{entry['useful_tokens_per_s']:,}",
        format_mfu(entry["mfu"]),
        f"{entry['peak_gb']:.1f}",
    )
    return (*what, *figures, bar, met, f"{where}, {entry['attention']}")


def format_rival(entry: Found, ours: Sequence[Found]) -> tuple[str, ...]:
    """A row of the table: another trainer, and how many times as fast ours is that trains the same shape in full in 16 bits."""
    where = f"{entry['date']}"
    if "failed" in entry:
        return (entry["shape"] or "", entry["command"], "", "", "", entry["failed"], "", "", "", "", where)
    times = times_as_fast(entry, ours)
    figures = (f"{entry['useful_tokens_per_s']:,}", format_mfu(entry["mfu"]), f"{entry['peak_gb']:.1f}")
    return (entry["shape"] or "", entry["name"], "", "", "", *figures, "", f"ours: {times:.2f} ×" if times else "", where)


def times_as_fast(rival: Found, ours: Sequence[Found]) -> float | None:
    """Our tokens a second by a rival's, at the same shape on the same GPU, all weights in 16 bits; None without such a run."""
    for entry in reversed(ours):
        same = all(entry[key] == rival[key] for key in ("shape", "device"))
        if same and (entry["method"], entry["precision"]) == ("full", "bf16") and "failed" not in entry:
            return float(entry["useful_tokens_per_s"] / rival["useful_tokens_per_s"])
    return None


def format_bar(bar: Found) -> str:
    """`≥ 14,000, MFU ≥ 0.58`."""
    texts = {"tokens_per_s": "≥ {:,}", "mfu": "MFU ≥ {}", "peak_gb": "≤ {} GB"}
    return ", ".join(texts[name].format(value) for name, value in bar.items())


def format_met(met: dict[str, bool]) -> list[str]:
    """`yes`, or what is missed."""
    names = {"tokens_per_s": "tokens/s", "mfu": "MFU", "peak_gb": "memory"}
    missed = [names[name] for name, meets in met.items() if not meets]
    return [f"no: {', '.join(missed)}"] if missed else ["yes"] * bool(met)


def format_mfu(mfu: float | None) -> str:
    return "–" if mfu is None else f"{mfu:.3f}"


if __name__ == "__main__":
    main()
