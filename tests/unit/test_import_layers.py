"""Which room may import which, and that what needs no torch loads none."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import chaccu

SOURCES = Path(chaccu.__file__).parent

# Rooms that anything may import, and those that may import anything. `testing` is for tests alone.
EVERYWHERE = {"artifact", "errors", "file_lock"}
FREE = {"cli", "demo", "testing"}
ALLOWED: dict[str, set[str]] = {
    "artifact": set(),
    "errors": set(),
    "file_lock": set(),
    "conversation": set(),
    "hub": set(),
    "lineage": {"conversation"},
    "data": {"conversation"},
    "train": {"conversation", "hub"},
    "weights": {"conversation", "hub", "lineage"},
    "engine": {"conversation", "hub", "lineage"},
    "serve": {"conversation"},
    "serve/worker": {"conversation", "engine"},
    "web": {"client", "rank"},
    "judge": {"conversation", "client", "rank"},
    "rank": set(),
    "cloud": set(),
    "client": {"conversation"},
}

# What may be imported when a module of the room is, rather than inside a function.
HEAVY = {"torch", "transformers", "peft", "gradio", "xllamacpp"}
HEAVY_AT_IMPORT: dict[str, set[str]] = {
    "train": {"torch", "transformers", "peft"},
    "weights": {"torch", "transformers", "peft"},
    "web": {"gradio"},
    "engine/batching": {"torch", "transformers"},
}

TORCH_FREE = ("chaccu.serve.gateway", "chaccu.web", "chaccu.judge", "chaccu.rank", "chaccu.client", "chaccu.data")


def list_modules() -> list[Path]:
    return sorted(SOURCES.rglob("*.py"))


def room_of(file: Path) -> str:
    """`serve/worker` for the worker, else the first folder or, for a module of its own, its name."""
    parts = file.relative_to(SOURCES).with_suffix("").parts
    return "serve/worker" if parts[:2] == ("serve", "worker") else parts[0]


def imports_of(file: Path, *, at_import_only: bool = False) -> Iterator[tuple[int, str]]:
    """Line and dotted name of all that a module imports; `from a import b` gives `a.b`."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in _outside_functions(tree) if at_import_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute here"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def _outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _outside_functions(child)


def test_every_room_is_in_the_table() -> None:
    rooms = {room_of(file) for file in list_modules()} - {"__init__"}
    assert rooms <= ALLOWED.keys() | FREE, "a new room needs its row here and in docs/architecture.md"


def test_rooms_import_only_what_the_table_allows() -> None:
    wrong = []
    for file in list_modules():
        room = room_of(file)
        if room in FREE:
            continue
        own = room.partition("/")[0]
        for line, name in imports_of(file):
            package, _, rest = name.partition(".")
            if package != "chaccu" or room == "__init__":
                continue
            target = rest.partition(".")[0]
            if target not in {own, *EVERYWHERE, *ALLOWED.get(room, set())}:
                wrong.append(f"{file.relative_to(SOURCES)}:{line}: {room} may not import {name}")
    assert wrong == []


def test_no_room_but_the_worker_knows_the_engines() -> None:
    gateway = [file for file in list_modules() if room_of(file) == "serve"]
    assert any("gateway" in file.parts for file in gateway)
    assert [name for file in gateway for _, name in imports_of(file) if name.startswith("chaccu.serve.worker")] == []


def test_heavy_libraries_are_imported_where_they_are_used() -> None:
    wrong = []
    for file in list_modules():
        for line, name in imports_of(file, at_import_only=True):
            library = name.partition(".")[0]
            folder = file.relative_to(SOURCES).parent.as_posix()
            if library in HEAVY and library not in HEAVY_AT_IMPORT.get(folder, HEAVY_AT_IMPORT.get(room_of(file), set())):
                wrong.append(f"{file.relative_to(SOURCES)}:{line}: import {library} inside the function that needs it")
    assert wrong == []


def test_the_package_itself_imports_nothing() -> None:
    assert [name for _, name in imports_of(SOURCES / "__init__.py")] in ([], ["__future__.annotations"])


@pytest.mark.parametrize("name", TORCH_FREE)
def test_it_starts_without_torch(name: str) -> None:
    code = f"""
import importlib, pkgutil, sys
package = importlib.import_module({name!r})
for found in pkgutil.walk_packages(getattr(package, "__path__", []), {name!r} + "."):
    importlib.import_module(found.name)
print([heavy for heavy in ("torch", "transformers", "peft", "xllamacpp") if heavy in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


# Within the gateway, in the order in which they may import one another.
GATEWAY_ROOMS = ("access", "workers", "dialects", "upstreams", "records", "http")


@pytest.mark.parametrize("room", GATEWAY_ROOMS)
def test_rooms_of_the_gateway_import_only_those_before_them(room: str) -> None:
    gateway = SOURCES / "serve" / "gateway"
    later = [f"chaccu.serve.gateway.{name}" for name in GATEWAY_ROOMS[GATEWAY_ROOMS.index(room) + 1 :]]
    wrong = [
        f"{file.name}:{line} imports {name}"
        for file in (gateway / room).glob("*.py")
        for line, name in imports_of(file)
        if name.startswith(tuple(later))
    ]
    assert wrong == []
    assert {folder.name for folder in gateway.iterdir() if (folder / "__init__.py").is_file()} == set(GATEWAY_ROOMS)
