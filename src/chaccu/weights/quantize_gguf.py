"""A GGUF file in fewer bits, tensor by tensor: which tensor gets which type, and the file around them.

A type such as q4_k_m is a mixture, after llama.cpp's: the output projection (the embedding where they are one) has six bits or
more; so have, in the types with `_m`, values and the second projection of the MLP in the first eighth of the layers, in the
last and in every third between. Rows that are no whole blocks of 256 take the next larger type with blocks of 32, and rows that
are not even those take float16. Vectors, norms and routers stay as they are.

Invariants: metadata and tokenizer are carried over byte for byte but for the entries that name the type; a file that is
quantised below eight bits is refused, for it would lose twice; values that are not finite are an error.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

from chaccu.artifact import (
    MANIFEST_NAME,
    Manifest,
    atomic_folder,
    copy_files,
    library_versions,
    read_manifest,
    require_free_space,
    sha256_file,
    write_manifest,
)
from chaccu.conversation import TOKENIZER_FILES
from chaccu.errors import MissingDependencyError, WeightsError
from chaccu.lineage import source_inputs, source_parents
from chaccu.weights.checkpoint import Progress, require_finite
from chaccu.weights.ggml_blocks import (
    BF16,
    F16,
    F32,
    Q4_0,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
    Quantiser,
    find_quantiser,
    row_bytes,
)
from chaccu.weights.gguf_file import GgufFile, TensorEntry, integer_pair, packed_bytes, write_gguf
from chaccu.weights.hashed_file import HashedFile
from chaccu.weights.row_pieces import split_rows

if TYPE_CHECKING:
    import numpy as np

_FILE_TYPE, _VERSION = "general.file_type", "general.quantization_version"
_QUANTIZATION_VERSION = 2
_BLOCK = re.compile(r"blk\.(\d+)\.(attn_v|ffn_down)\.weight")
_LARGE_BLOCK, _SMALL_BLOCK = 256, 32
# Of rows that are no whole large blocks.
_SMALLER_BLOCKS = {Q4_K: Q5_0, Q5_K: Q5_1, Q6_K: Q8_0}


class Mixture(msgspec.Struct, frozen=True):
    """`file_type`: as llama.cpp numbers it; `usual`: ggml's type of most tensors; `finer`: of those that ask for more bits."""

    file_type: int
    usual: int
    finer: int | None = None


GGUF_TYPES = {
    "q8_0": Mixture(7, Q8_0),
    "q6_k": Mixture(18, Q6_K),
    "q5_k_m": Mixture(17, Q5_K, Q6_K),
    "q5_0": Mixture(8, Q5_0),
    "q4_k_m": Mixture(15, Q4_K, Q6_K),
    "q4_0": Mixture(2, Q4_0),
}


def quantize_gguf(
    source: Path, out: Path, kind: str, *, origin: Manifest | None = None, progress: Progress | None = None
) -> Manifest:
    """Write the GGUF file `source` in `kind`, one of `GGUF_TYPES`, into a folder to serve, with the tokenizer that lies beside
    it.

    `origin`: what the file was made of, which the copy is to name in its place; `progress(done, total)` counts bytes written.
    Raises `WeightsError` when it is quantised already, `MissingDependencyError` for a type that needs llama.cpp, `StorageError`
    when the disk is full.
    """
    quantiser = find_quantiser()
    work = _Quantization(GgufFile(source), GGUF_TYPES[kind], quantiser)
    if not quantiser.knows(GGUF_TYPES[kind].usual):
        raise MissingDependencyError("xllamacpp", extra="cpu-engine", needed_for=f"--type {kind}")
    total = sum(packed_bytes(shape, type_id) for _, shape, type_id in work.table)
    require_free_space(out.parent, total + 64_000_000, "the quantised model")
    with atomic_folder(out) as folder:
        with HashedFile(folder / "model.gguf") as target:
            for done in write_gguf(
                target, pairs=work.pairs(), tensors=work.table, packed=work.packed, alignment=work.file.alignment
            ):
                if progress:
                    progress(done, total)
        copy_files(source.parent, folder, TOKENIZER_FILES)
        assert target.entry is not None
        manifest = _describe(source, out.name, kind, work, quantiser, origin)
        return write_manifest(folder, manifest, hashed={"model.gguf": target.entry})


class _Quantization:
    """The quantised file's tensors, one at a time; `table`: their names, shapes and types."""

    def __init__(self, file: GgufFile, mixture: Mixture, quantiser: Quantiser) -> None:
        self.file, self._mixture, self._quantiser = file, mixture, quantiser
        self._layers = int(file.get(f"{file.architecture}.block_count", 0))
        for entry in file.tensors.values():
            if entry.type_id not in (F32, F16, BF16, Q8_0) and _is_matrix(entry):
                raise WeightsError(
                    f"{file.path} is quantised already: {entry.name} is in {type_name(entry.type_id)}.",
                    remedy="quantise a file in 16 bits, or in Q8_0",
                )
        self._types = {entry.name: self._type_of(entry) for entry in file.tensors.values()}
        self.table = [(entry.name, entry.shape, self._types[entry.name]) for entry in file.tensors.values()]

    def _type_of(self, entry: TensorEntry) -> int:
        if not _is_matrix(entry):
            return entry.type_id
        block = _BLOCK.fullmatch(entry.name)
        output = "output.weight" if "output.weight" in self.file.tensors else "token_embd.weight"
        kind = self._mixture.usual
        if entry.name == output:
            kind = Q6_K if kind != Q8_0 and self._quantiser.knows(Q6_K) else Q8_0
        elif block and self._mixture.finer is not None and asks_for_more(int(block[1]), self._layers):
            kind = self._mixture.finer
        columns = entry.shape[-1]
        if columns % _LARGE_BLOCK:
            # An output projection is worth eight bits there.
            kind = Q8_0 if entry.name == output else _SMALLER_BLOCKS.get(kind, kind)
        return kind if columns % _SMALL_BLOCK == 0 else F16

    def pairs(self) -> tuple[int, bytes]:
        """The metadata, with the new type."""
        count, kept = self.file.pairs_without(_FILE_TYPE, _VERSION)
        named = integer_pair(_FILE_TYPE, self._mixture.file_type) + integer_pair(_VERSION, _QUANTIZATION_VERSION)
        return count + 2, kept + named

    def packed(self, name: str) -> np.ndarray:
        """One tensor's bytes."""
        import gguf
        import numpy as np

        entry, kind = self.file.tensors[name], self._types[name]
        data, columns = self.file.packed(name), entry.shape[-1]
        if kind == entry.type_id == Q8_0:
            return data
        rows = data.reshape(-1, row_bytes(columns, entry.type_id))
        stored = gguf.GGMLQuantizationType(entry.type_id)
        target = data if kind == entry.type_id else np.empty((len(rows), row_bytes(columns, kind)), np.uint8)
        for begin, end in split_rows((len(rows), columns)):
            values = np.require(gguf.quants.dequantize(rows[begin:end], stored), np.float32, ["C", "W"])
            require_finite(torch.from_numpy(values), name, self.file.path)
            if kind != entry.type_id:
                target[begin:end] = self._quantiser.quantise(values, kind)
        return target

    def count_types(self) -> dict[str, int]:
        """Number of tensors of each type."""
        return dict(Counter(type_name(kind) for kind in self._types.values()))


def asks_for_more(layer: int, layers: int) -> bool:
    """Whether a mixture gives this layer's values and second MLP projection more bits: the first and last eighth, and every
    third between.
    """
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def type_name(type_id: int) -> str:
    """ggml's name of a type."""
    import gguf

    return str(gguf.GGMLQuantizationType(type_id).name)


def _is_matrix(entry: TensorEntry) -> bool:
    """Whether it is one of the tensors that are quantised."""
    return (
        len(entry.shape) >= 2
        and entry.name.endswith(".weight")
        and not entry.name.endswith(("norm.weight", "ffn_gate_inp.weight"))
    )


def _describe(
    source: Path, name: str, kind: str, work: _Quantization, quantiser: Quantiser, origin: Manifest | None
) -> Manifest:
    made = Manifest(
        kind="gguf",
        name=name,
        license=work.file.get("general.license"),
        settings={"type": kind, "quantiser": quantiser.name, "tensors": work.count_types()},
        versions=library_versions("gguf", "xllamacpp"),
    )
    if not (source.parent / MANIFEST_NAME).is_file():
        return msgspec.structs.replace(made, inputs={source.name: sha256_file(source)})
    found = read_manifest(source.parent)
    # A file that was put beside an artifact is none of its parts.
    beside = {} if source.name in found.files else {source.name: sha256_file(source)}
    return msgspec.structs.replace(
        made,
        chat_format=found.chat_format,
        tokenizer_sha256=found.tokenizer_sha256,
        license=found.license,
        parents=source_parents(source.parent, found) if origin is None else origin.parents,
        inputs=source_inputs(source.parent, found) | beside if origin is None else origin.inputs,
    )
