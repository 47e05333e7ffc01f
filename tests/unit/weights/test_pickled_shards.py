"""Files of torch.save, read without loading them: as torch itself reads them, and refused where they are more than tensors."""

from __future__ import annotations

import builtins
import pickle
import struct
import subprocess
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

from chaccu.errors import StorageError, WeightsError

torch = pytest.importorskip("torch", reason="torch is not installed")

from chaccu.weights.pickled_shards import PickledFile, list_pickled_shards  # noqa: E402 (torch may be absent)

LAYOUTS = [pytest.param(True, id="archive"), pytest.param(False, id="stream")]
DTYPES = [
    *(
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
    ),
    *(torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64),
]


def save(path: Path, tensors: Any, is_archive: bool = True) -> PickledFile:
    torch.save(tensors, path, _use_new_zipfile_serialization=is_archive)
    return PickledFile(path)


def assert_same(file: PickledFile, tensors: dict[str, Any]) -> None:
    assert list(file.entries) == list(tensors)
    for name, tensor in tensors.items():
        found = file.read(name)
        assert found.dtype == tensor.dtype
        assert found.is_contiguous()
        assert found.shape == tensor.shape == file.entries[name].shape
        assert found.reshape(-1).view(torch.uint8).tolist() == tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("is_archive", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_read_as_it_was_saved(tmp_path: Path, dtype: Any, is_archive: bool) -> None:
    tensors = {"b": torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype), "a": torch.ones(5).to(dtype)}
    assert_same(save(tmp_path / "x.bin", tensors, is_archive), tensors)


@pytest.mark.parametrize("is_archive", LAYOUTS)
def test_views_of_any_kind_are_read_as_they_look(tmp_path: Path, is_archive: bool) -> None:
    base = torch.arange(60, dtype=torch.float32).reshape(6, 10)
    tensors = {
        "whole": base,
        "rows": base[2:4],
        "columns": base[:, 3:7],
        "turned": base.t(),
        "steps": base[::2, ::3],
        "one": base[5, 9],
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
    }
    file = save(tmp_path / "x.bin", tensors, is_archive)
    assert_same(file, {name: tensor.detach() for name, tensor in tensors.items()})
    assert file.find_twins() == []


@pytest.mark.parametrize("is_archive", LAYOUTS)
def test_a_state_dict_with_its_metadata_is_read_and_its_twins_are_told(tmp_path: Path, is_archive: bool) -> None:
    model = torch.nn.Sequential(OrderedDict(one=torch.nn.Linear(3, 4), two=torch.nn.Linear(3, 4)))
    model.two.weight = model.one.weight
    state = model.state_dict()
    assert hasattr(state, "_metadata")
    file = save(tmp_path / "x.bin", state, is_archive)
    assert_same(file, dict(state))
    assert file.find_twins() == [["one.weight", "two.weight"]]


class _Calls:
    """What a pickle of `function(*arguments)` is made of."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("is_archive", LAYOUTS)
@pytest.mark.parametrize(
    ("evil", "named"),
    [
        (lambda trace: _Calls(subprocess.getoutput, f"touch {trace}"), "(commands|subprocess).getoutput"),
        (lambda trace: _Calls(builtins.exec, f"open({str(trace)!r}, 'w')"), "__builtin__.exec"),
        (lambda trace: _Calls(builtins.getattr, torch.ones(1), "shape"), "__builtin__.getattr"),
        (lambda trace: _Calls(torch.load, str(trace)), "torch.serialization.load"),
        (lambda trace: {"w": torch.ones(1).numpy()}, "numpy"),
    ],
)
def test_whatever_else_a_pickle_imports_is_refused_by_name_and_not_run(
    tmp_path: Path, evil: Any, named: str, is_archive: bool
) -> None:
    trace = tmp_path / "trace"
    with pytest.raises(WeightsError, match=f"imports {named}.*nothing of it was run") as refusal:
        save(tmp_path / "x.bin", {"w": torch.ones(2), "evil": evil(trace)}, is_archive)
    assert "safetensors" in refusal.value.remedy
    assert not trace.exists()


@pytest.mark.parametrize(
    "program",
    [
        # Attributes set on what it was given, as tuple (dict, slots) and as dict; the function then called.
        b"\x80\x02ctorch._utils\n_rebuild_parameter\nN}X\x05\x00\x00\x00buildK\x01s\x86b.",
        b"\x80\x02ctorch._utils\n_rebuild_parameter\n}X\x05\x00\x00\x00buildK\x01sb.",
        # A class made of what it was given; an extension code; a storage that is none; a loop of names.
        b"\x80\x02ccollections\nOrderedDict\n)\x81.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02X\x01\x00\x00\x00aQ.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.",
        b"cposix\nsystem\n(S'true'\ntR.",
        b"\x80\x02\x8d\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\x02K\x01.",
        b"\x80\x02}K\x01K\x02s.",
        b"",
    ],
)
def test_pickles_that_mean_harm_end_in_an_error(tmp_path: Path, program: bytes) -> None:
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", program)
    with pytest.raises(WeightsError):
        PickledFile(path)
    prelude = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    path.write_bytes(prelude + program)
    with pytest.raises(WeightsError):
        PickledFile(path)
    # And nothing that it was given has changed.
    assert_same(save(tmp_path / "y.bin", {"w": torch.nn.Parameter(torch.ones(2))}), {"w": torch.ones(2)})


@pytest.mark.parametrize("is_archive", LAYOUTS)
def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path: Path, is_archive: bool) -> None:
    path = tmp_path / "x.bin"
    save(path, {"w": torch.ones(300), "v": torch.ones(4)}, is_archive)
    whole = path.read_bytes()
    for kept in (0, 1, 3, 20, 100, len(whole) // 2, len(whole) - 700, len(whole) - 20, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(WeightsError, match=r"x\.bin"):
            PickledFile(path)


def test_what_is_no_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="'optimizer', which is of type dict"):
        save(tmp_path / "x.bin", {"w": torch.ones(2), "optimizer": {"w": torch.ones(2)}})
    with pytest.raises(WeightsError, match="of type list, not tensors by name"):
        save(tmp_path / "x.bin", [torch.ones(2)])
    with pytest.raises(WeightsError, match="a tensor, not tensors by name"):
        save(tmp_path / "x.bin", torch.ones(2))
    with pytest.raises(WeightsError, match=r"imports torch\._utils\._rebuild_sparse_tensor"):
        save(tmp_path / "x.bin", {"w": torch.ones(2, 2).to_sparse()})


def test_a_view_that_stands_for_more_than_is_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="w reaches beyond its storage"):
        save(tmp_path / "x.bin", {"w": torch.ones(1).expand(10_000_000)})


@pytest.mark.parametrize("change", [(b"K\x03K\x04\x86", b"K\x03K\xff\x86"), (b"K\x04K\x01\x86", b"K\xffK\x01\x86")])
def test_sizes_beyond_the_storage_are_refused(tmp_path: Path, change: tuple[bytes, bytes]) -> None:
    path = tmp_path / "x.bin"
    save(path, {"w": torch.ones(3, 4)}, is_archive=False)
    data = path.read_bytes()
    assert data.count(change[0]) == 1
    path.write_bytes(data.replace(*change))
    with pytest.raises(WeightsError, match="beyond its storage"):
        PickledFile(path)


def test_an_archive_that_is_compressed_or_of_another_machine_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "x.bin", {"w": torch.ones(300)})
    with zipfile.ZipFile(tmp_path / "x.bin") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "y.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(WeightsError, match="is compressed"):
        PickledFile(tmp_path / "y.bin")
    with zipfile.ZipFile(tmp_path / "z.bin", "w") as archive:
        for name, data in members.items():
            archive.writestr(name, b"big" if name.endswith("byteorder") else data)
    with pytest.raises(WeightsError, match="big-endian"):
        PickledFile(tmp_path / "z.bin")


def test_other_files_are_told_for_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(WeightsError, match="Git LFS's pointer"):
        PickledFile(path)
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(WeightsError, match=r"no file of torch\.save"):
        PickledFile(path)
    path.write_bytes(pickle.dumps(1) * 3)
    with pytest.raises(WeightsError, match=r"a pickle, but none of torch\.save"):
        PickledFile(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("letter.txt", "dear")
    with pytest.raises(WeightsError, match=r"without the one data\.pkl"):
        PickledFile(path)
    with pytest.raises(StorageError, match="no file"):
        PickledFile(tmp_path / "none.bin")


def test_a_storage_of_another_size_than_the_stream_has_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    save(path, {"w": torch.ones(300)}, is_archive=False)
    data = path.read_bytes()
    path.write_bytes(data.replace(struct.pack("<q", 300), struct.pack("<q", 301)))
    with pytest.raises(WeightsError, match="301 elements of 300"):
        PickledFile(path)


def test_shards_are_those_of_the_index_or_all_that_are_numbered(tmp_path: Path) -> None:
    assert list_pickled_shards(tmp_path, None) == []
    names = [f"pytorch_model-{at:05}-of-00002.bin" for at in (1, 2)]
    for name in (*names, "training_args.bin"):
        (tmp_path / name).touch()
    assert [path.name for path in list_pickled_shards(tmp_path, None)] == names
    assert [path.name for path in list_pickled_shards(tmp_path, {"w": names[1]})] == names[1:]
    for wrong in ("../x.bin", "/etc/passwd", "none.bin"):
        with pytest.raises(WeightsError, match="is not there"):
            list_pickled_shards(tmp_path, {"w": wrong})
    (tmp_path / names[0]).unlink()
    with pytest.raises(WeightsError, match=f"{names[0]} .* not there"):
        list_pickled_shards(tmp_path, None)
    (tmp_path / "pytorch_model-00001-of-00003.bin").touch()
    with pytest.raises(WeightsError, match="several models"):
        list_pickled_shards(tmp_path, None)
    (tmp_path / "pytorch_model.bin").touch()
    assert [path.name for path in list_pickled_shards(tmp_path, None)] == ["pytorch_model.bin"]
