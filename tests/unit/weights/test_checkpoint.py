"""Weights by name out of any files, and into files of any size: what transformers' own library reads, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chaccu.artifact import FileEntry, sha256_file
from chaccu.errors import StorageError, WeightsError

torch = pytest.importorskip("torch", reason="torch is not installed")
safetensors_torch = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

from chaccu.weights.checkpoint import Checkpoint, plan_shards, require_finite, write_checkpoint  # noqa: E402 (torch may be absent)
from chaccu.weights.safetensors_file import DTYPES, SafetensorsFile, TensorSpec  # noqa: E402

TENSORS = {
    "embed": torch.arange(60, dtype=torch.float32).reshape(10, 6),
    "norm": torch.ones(6, dtype=torch.bfloat16),
    "proj": torch.full((6, 6), 0.5, dtype=torch.float16),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "empty": torch.zeros((0, 4), dtype=torch.float32),
}
SPECS = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()]


def write(folder: Path, **options: int) -> dict[str, FileEntry]:
    folder.mkdir(parents=True, exist_ok=True)
    return write_checkpoint(folder, SPECS, TENSORS.__getitem__, **options)


def assert_same(found: dict[str, torch.Tensor]) -> None:
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_what_is_written_the_library_reads(tmp_path: Path) -> None:
    written = write(tmp_path)
    assert_same(safetensors_torch.load_file(tmp_path / "model.safetensors"))
    path = tmp_path / "model.safetensors"
    assert written == {path.name: FileEntry(path.stat().st_size, sha256_file(path))}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_what_the_library_writes_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    safetensors_torch.save_file({"b": tensor, "a": tensor[:1].clone()}, tmp_path / "x.safetensors", metadata={"who": "me"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.metadata == {"who": "me"}
    assert file.entries["b"].shape == (2, 3)
    assert file.read("b").dtype == dtype
    assert file.read("b").view(torch.uint8).tolist() == tensor.view(torch.uint8).tolist()
    assert file.read("a").view(torch.uint8).tolist() == tensor[:1].view(torch.uint8).tolist()


def test_small_shards_have_an_index_and_are_one_checkpoint(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    tmp_path.joinpath("m").mkdir()
    written = write_checkpoint(
        tmp_path / "m", SPECS, TENSORS.__getitem__, max_shard_bytes=100, progress=lambda *done: seen.append(done)
    )
    assert list(written) == [f"model-{at:05}-of-00002.safetensors" for at in (1, 2)]
    assert seen == [(240, 332), (252, 332), (324, 332), (332, 332), (332, 332)]
    checkpoint = Checkpoint(tmp_path / "m")
    assert_same({name: checkpoint.read(name) for name in checkpoint.entries})
    assert checkpoint.size_bytes == 332
    assert checkpoint.sha256() == {name: entry.sha256 for name, entry in written.items()}


def test_a_shard_is_full_before_it_is_too_large() -> None:
    sizes = [40, 60, 1, 200, 50, 50]
    specs = [TensorSpec(str(at), torch.uint8, (size,)) for at, size in enumerate(sizes)]
    shards = plan_shards(specs, 100)
    assert [[spec.size_bytes for spec in shard] for shard in shards.values()] == [[40, 60], [1], [200], [50, 50]]


@pytest.mark.parametrize(
    ("kept", "message"),
    [(4, "is no safetensors file"), (50, "cut off in its header"), (-1, "cut off: its tensors need")],
)
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, kept: int, message: str) -> None:
    write(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(WeightsError, match=message):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [3, 3]}, "has 8 bytes; its shape and dtype need 36"),
        ({"dtype": "F13"}, "of dtype F13"),
        ({"data_offsets": [-4, 4]}, "no sizes"),
        ({"shape": [True, 2]}, "no sizes"),
        ({"data_offsets": [0]}, "damaged header"),
        ({"data_offsets": [4, 12]}, "lies inside another"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    text = json.dumps({"a": {**entry, **change}, "b": entry}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    with pytest.raises(WeightsError, match=message):
        SafetensorsFile(tmp_path / "x.safetensors")


def test_an_index_that_is_not_of_its_shards_is_refused(tmp_path: Path) -> None:
    write(tmp_path, max_shard_bytes=100)
    index = tmp_path / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    first, second = sorted(set(places["weight_map"].values()))
    index.write_text(json.dumps({"weight_map": {**places["weight_map"], "norm": first}}))
    with pytest.raises(WeightsError, match=f"(?s)norm is in {first}, and it is in {second}.*chaccu weights repair"):
        Checkpoint(tmp_path)
    index.write_text("{")
    with pytest.raises(WeightsError, match="is damaged"):
        Checkpoint(tmp_path)
    index.write_text(json.dumps(places))
    (tmp_path / second).unlink()
    with pytest.raises(WeightsError, match=f"names {second}, which is not there"):
        Checkpoint(tmp_path)


def test_one_name_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        safetensors_torch.save_file({"w": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(WeightsError, match="w is both in"):
        Checkpoint(tmp_path)


def test_a_folder_without_safetensors_is_refused_and_says_why(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"(?s)holds no safetensors.*name a folder"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(WeightsError, match="chaccu weights repair"):
        Checkpoint(tmp_path)


def test_a_tensor_that_is_not_as_announced_is_an_error(tmp_path: Path) -> None:
    spec = TensorSpec("w", torch.float32, (2, 2))
    with pytest.raises(WeightsError, match="was announced"):
        write_checkpoint(tmp_path, [spec], lambda _: torch.ones(2, 2, dtype=torch.float16))
    with pytest.raises(WeightsError, match="was announced"):
        write_checkpoint(tmp_path, [spec], lambda _: torch.ones(4))


def test_a_model_larger_than_the_disk_is_refused_before_it_is_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="are free"):
        write_checkpoint(tmp_path, [TensorSpec("w", torch.float32, (2**60,))], lambda _: torch.ones(1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_named(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    tensor = torch.ones(4, 4).to(dtype)
    require_finite(tensor, "w", tmp_path)
    tensor[2, 1] = value
    with pytest.raises(WeightsError, match=r"w in .* not finite"):
        require_finite(tensor, "w", tmp_path)
