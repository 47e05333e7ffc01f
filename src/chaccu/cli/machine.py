"""`survey_machine`: hardware and installed libraries, read without importing any of them.

Invariants: quick (no library is loaded; the GPU is asked through `nvidia-smi`), and it never fails because something is
missing or odd: what cannot be read is None, and a GPU driver that does not answer is named. It ignores GPUs but
NVIDIA's.
"""

from __future__ import annotations

import csv
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

import msgspec

_CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_NVIDIA_SMI_S = 5.0


class Gpu(msgspec.Struct, frozen=True):
    """One CUDA device, as the driver sees it."""

    name: str
    memory_bytes: int
    memory_free_bytes: int


class Part(msgspec.Struct, frozen=True):
    """A library or program. `version` is None for one that is not there or does not tell it."""

    name: str
    found: bool
    version: str | None = None


class Ability(msgspec.Struct, frozen=True, kw_only=True):
    """Something Chaccu does, the parts it needs for that, and, unless `ready`, the command that adds what is missing."""

    name: str
    ready: bool
    parts: tuple[Part, ...]
    remedy: str = ""
    note: str = ""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What the survey has found. Memory is the smaller of the machine's and the container's; None where unknown.

    `gpu_problem`: why the GPU driver that is installed lists none, "" if it does or there is no driver.
    """

    chaccu: str
    python: str
    system: str
    cores: int
    memory_bytes: int | None
    memory_free_bytes: int | None
    disk_free_bytes: int
    gpus: list[Gpu]
    gpu_problem: str
    torch: str | None
    torch_cuda: str | None
    abilities: list[Ability]


def survey_machine() -> Machine:
    """Look at this machine, from the current folder."""
    memory_bytes, memory_free_bytes = _read_memory()
    gpus, gpu_problem = _find_gpus()
    torch, torch_cuda = _find_library("torch").version, _torch_cuda()
    return Machine(
        chaccu=_version("chaccu") or "not installed (run from its sources)",
        python=".".join(str(part) for part in sys.version_info[:3]),
        system=f"{platform.system()} {platform.machine()}",
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=memory_bytes,
        memory_free_bytes=memory_free_bytes,
        disk_free_bytes=shutil.disk_usage(Path.cwd()).free,
        gpus=gpus,
        gpu_problem=gpu_problem,
        torch=torch,
        torch_cuda=torch_cuda,
        abilities=_list_abilities(gpus, torch, torch_cuda),
    )


def _list_abilities(gpus: list[Gpu], torch: str | None, torch_cuda: str | None) -> list[Ability]:
    device = "on the CPU"
    if gpus:
        device = f"on {len(gpus)} GPU" + ("s" if len(gpus) > 1 else "")
        if torch is not None and torch_cuda is None:
            device = "on the CPU only: this torch is built without CUDA, install one with it to use the GPU"
    elif torch_cuda is not None:
        device = "on the CPU: torch is built for CUDA, but no GPU answers"
    chromium = next((name for name in _CHROMIUM if shutil.which(name)), None)
    browser = Part("chromium", chromium is not None)
    return [
        _ability("clean data", "chaccu", "polars", "ijson", "selectolax", "html-to-markdown", "rensa", "pycld2"),
        _ability("fine-tune", "chaccu[train]", "torch", "transformers", "peft", "safetensors", note=device),
        _ability("engine llamacpp", "chaccu[cpu-engine]", "xllamacpp", note="GGUF on the CPU"),
        _ability("engine transformers", "chaccu[train]", "torch", "transformers", note=device),
        _ability("engine vllm", "chaccu[vllm]", "vllm", note="" if gpus else "it needs a GPU"),
        _ability("gateway", "chaccu", "starlette", "uvicorn", "websockets", "aiohttp"),
        _ability("chat page", "chaccu[web]", "gradio", "openai"),
        _ability("ask and judge", "chaccu", "openai"),
        _ability("rank", "chaccu", "evalica"),
        _ability(
            "GPU training", "chaccu[gpu]", "flash-attn-4", "torchao", "bitsandbytes", note="" if gpus else "it needs a GPU"
        ),
        _ability("browser tests", "chaccu[dev]", "playwright", other=browser, other_remedy="apt-get install chromium"),
    ]


def _ability(
    name: str, extra: str, *libraries: str, note: str = "", other: Part | None = None, other_remedy: str = ""
) -> Ability:
    parts = [_find_library(library) for library in libraries]
    steps = [] if all(part.found for part in parts) else [f"pip install '{extra}'"]
    if other is not None:
        parts.append(other)
        if not other.found:
            steps.append(other_remedy)
    return Ability(name=name, ready=not steps, parts=tuple(parts), remedy=" && ".join(steps), note=note)


def _find_library(name: str) -> Part:
    version = _version(name)
    return Part(name, version is not None, version)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _torch_cuda() -> str | None:
    """The CUDA version that torch is built for, out of its version file; None for a CPU build."""
    spec = util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).with_name("version.py")
    if not file.is_file():
        return None
    built_for = re.search(r"^cuda\b[^=]*=\s*['\"]([\d.]+)['\"]", file.read_text(encoding="utf-8"), re.MULTILINE)
    return built_for[1] if built_for else None


def _find_gpus() -> tuple[list[Gpu], str]:
    """The CUDA devices, and what is wrong when the driver lists none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return [], ""
    query = [program, "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_NVIDIA_SMI_S, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return [], f"nvidia-smi does not answer: {error}"
    rows = [[cell.strip() for cell in row] for row in csv.reader(answer.splitlines())]
    # Some devices share their memory with the host and answer "[N/A]" for all of it.
    gpus = [Gpu(row[0], int(row[1]) << 20, int(row[2]) << 20) for row in rows if len(row) == 3 and row[1].isdigit()]
    return gpus, "" if gpus else "nvidia-smi lists no GPU with memory of its own"


def _read_memory() -> tuple[int | None, int | None]:
    """Total and available bytes."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        fields = {name: int(value) << 10 for name, value in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
        total, free = fields["MemTotal"], fields["MemAvailable"]
    except (OSError, KeyError):
        names = getattr(os, "sysconf_names", {})
        known = "SC_PHYS_PAGES" in names and "SC_PAGE_SIZE" in names
        return (os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else None), None
    limit, used = _read_number("/sys/fs/cgroup/memory.max"), _read_number("/sys/fs/cgroup/memory.current")
    if limit is not None and limit < total:
        return limit, min(free, max(0, limit - (used or 0)))
    return total, free


def _read_number(path: str) -> int | None:
    try:
        text = Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
