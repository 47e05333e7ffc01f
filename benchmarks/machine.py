"""What a result file says of where it was measured, its name, and writing it."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def describe_machine(*packages: str, commit: str | None = None) -> dict[str, Any]:
    """Date, commit, processor, cores, memory in bytes, and the versions of Python and of `packages`, None of one that is not
    installed. `commit`: what is measured, where the code lies outside of its repository."""
    return {
        "date": date.today().isoformat(),
        "commit": commit or _commit(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
    }


def results_file(kind: str, device: str) -> Path:
    """`train-h100.json` for `NVIDIA H100 80GB HBM3`: the first word that is a model's, else the whole name."""
    model = re.search(r"\b[A-Z]{1,3}\d+\b", device)
    name = model[0] if model else re.sub(r"\W+", "-", device).strip("-")
    return RESULTS / f"{kind}-{name.lower()}.json"


def write_results(found: dict[str, Any], path: Path) -> None:
    """Write the file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


def _commit() -> str:
    root = Path(__file__).parents[1]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain", "src"], cwd=root, capture_output=True, text=True).stdout.strip()
    return commit + (" with changes" if changed else "")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
