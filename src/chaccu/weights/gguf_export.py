"""A Hugging Face folder as a GGUF file in a folder that the CPU engine serves.

Invariants: tensors pass one at a time; what the folder holds and llama.cpp would not compute with is refused by name; the
vocabulary that was written is read back and gives the ids that training saw, or nothing is left (`token_identity`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from chaccu.artifact import (
    Manifest,
    atomic_folder,
    library_versions,
    manifest_sha256,
    require_free_space,
    weights_sha256,
    write_manifest,
)
from chaccu.conversation import TOKENIZER_FORMAT, ChatFormat, TextTokenizer, read_template
from chaccu.errors import WeightsError
from chaccu.weights.checkpoint import Checkpoint, Progress, require_finite
from chaccu.weights.gguf_architectures import Architecture, ModelConfig, find_architecture_of
from chaccu.weights.gguf_file import PairValue, pack_pairs, packed_bytes, write_gguf
from chaccu.weights.gguf_rope import FACTORS_NAME, frequency_factors
from chaccu.weights.gguf_tensors import F32, TYPES, choose_type, find_arrangement, pack_tensor
from chaccu.weights.gguf_vocabulary import Vocabulary, write_vocabulary
from chaccu.weights.hashed_file import HashedFile
from chaccu.weights.token_identity import (
    Template,
    copy_tokenizer,
    find_format,
    require_gguf_ids,
    settle_template,
    trained_manifest,
)

if TYPE_CHECKING:
    import numpy as np

FILE_NAME = "model.gguf"
# llama.cpp's numbers for what most tensors of a file are (llama_ftype), and for the layout of its quantised blocks.
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
_QUANTIZATION_VERSION = 2
# Constants that old checkpoints hold and that follow from the config.
_DERIVED = ".rotary_emb.inv_freq"
_SPARE_BYTES = 64_000_000


def export_gguf(
    source: Path, out: Path, *, kind: str = "f16", chat_format: str | None = None, progress: Progress | None = None
) -> Manifest:
    """Write the model in `source` as `out`/model.gguf with its tokenizer and a manifest, atomically.

    `kind`: a key of `TYPES`; vectors stay float32. `chat_format`: where the folder's manifest names none. `progress(done,
    total)` counts bytes. Raises `WeightsError` for a model, tokenizer or value that the file cannot hold, `StorageError` when
    the disk is full.
    """
    config = ModelConfig(source)
    architecture = find_architecture_of(config)
    metadata = architecture.write_config(config)
    trained = trained_manifest(source)
    named = chat_format or (trained.chat_format if trained else None)
    form = find_format(named, source)
    tokenizer = TextTokenizer.load(source)
    template = settle_template(read_template(source), tokenizer, form)
    vocabulary = write_vocabulary(source, int(config.require("vocab_size")), turn_end=_turn_end(form))
    tensors = _Tensors(Checkpoint(source), config, architecture, TYPES[kind])
    name = trained.name if trained else source.resolve().name
    pairs = pack_pairs({**metadata, **_describe(name, kind, trained, template), **vocabulary.pairs})
    size = sum(packed_bytes(shape, type_id) for _, shape, type_id in tensors.table)
    require_free_space(out.parent, size + _SPARE_BYTES, "the GGUF model")
    with atomic_folder(out) as folder:
        with HashedFile(folder / FILE_NAME) as file:
            for done in write_gguf(file, pairs=pairs, tensors=tensors.table, packed=tensors.packed):
                if progress:
                    progress(done, size)
        copy_tokenizer(source, folder, template)
        require_gguf_ids(folder / FILE_NAME, tokenizer, form)
        assert file.entry is not None
        facts = _facts(config, metadata, vocabulary, template, trained)
        return write_manifest(
            folder,
            Manifest(
                kind="gguf",
                name=name,
                chat_format=_servable_format(named, template),
                tokenizer_sha256=tokenizer.sha256,
                license=trained.license if trained else None,
                parents={trained.kind: manifest_sha256(source)} if trained else {},
                inputs=(weights_sha256(trained) if trained else {}) or tensors.checkpoint.sha256(),
                settings={"type": kind, "architecture": architecture.name},
                facts=facts,
                versions=library_versions("gguf", "torch", "tokenizers"),
            ),
            hashed={FILE_NAME: file.entry},
        )


class _Tensors:
    """The tensors of a GGUF file to be: its `table`, and the `packed` bytes of each."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, architecture: Architecture, type_id: int) -> None:
        self.checkpoint = checkpoint
        self._architecture = architecture
        self._heads = int(config.require("num_attention_heads"))
        self._kv_heads = int(config.get("num_key_value_heads", self._heads))
        tied = bool(config.get("tie_word_embeddings", architecture.windows))
        self._sources: dict[str, str] = {}
        self._types: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        # It has no source, as it follows from the config.
        self._factors = frequency_factors(config.rope(architecture.theta), config.head_dim)
        if self._factors is not None:
            self._announce(FACTORS_NAME, self._factors.shape, F32)
        for name, entry in checkpoint.entries.items():
            if name.endswith(_DERIVED) or (tied and name == "lm_head.weight"):
                continue
            known = architecture.gguf_name(name)
            if known is None:
                raise WeightsError(
                    f"{checkpoint.folder} holds {name}, which the architecture {architecture.name} of GGUF does not have.",
                    remedy="serve the Hugging Face folder itself",
                )
            self._sources[known] = name
            self._announce(known, entry.shape, choose_type(entry.shape, type_id))
        self._check_whole(config, tied)

    def _announce(self, name: str, shape: tuple[int, ...], type_id: int) -> None:
        self._shapes[name], self._types[name] = shape, type_id

    @property
    def table(self) -> list[tuple[str, tuple[int, ...], int]]:
        """Name, shape and ggml type of each tensor."""
        return [(name, shape, self._types[name]) for name, shape in self._shapes.items()]

    def _check_whole(self, config: ModelConfig, tied: bool) -> None:
        found = set(self._sources.values())
        wanted = self._architecture.required_names(int(config.require("num_hidden_layers")), tied=tied)
        missing = next((name for name in wanted if name not in found), None)
        if missing is not None:
            raise WeightsError(
                f"{self.checkpoint.folder} lacks {missing}, which its config.json asks for.", remedy="fetch it again"
            )
        rows = self.checkpoint.entries["model.embed_tokens.weight"].shape[0]
        if rows != config.require("vocab_size"):
            raise WeightsError(
                f"{config.path} says vocab_size = {config.require('vocab_size'):,}, and the embedding has {rows:,} rows.",
                remedy=f"chaccu weights repair {self.checkpoint.folder}",
            )

    def packed(self, name: str) -> np.ndarray:
        """The bytes of one tensor by its GGUF name."""
        import numpy as np

        if name == FACTORS_NAME and self._factors is not None:
            return self._factors.view(np.uint8)
        source = self._sources[name]
        tensor = self.checkpoint.read(source)
        require_finite(tensor, source, self.checkpoint.folder)
        arrangement = find_arrangement(self._architecture, name, tensor.shape[0], self._heads, self._kv_heads)
        return pack_tensor(tensor, self._types[name], arrangement, source)


def _turn_end(chat_format: ChatFormat | None) -> str | None:
    """The text at which a server ends an answer, when it is one."""
    return chat_format.stop[0].strip() if chat_format and chat_format.stop else None


def _servable_format(name: str | None, template: Template) -> str | None:
    """The manifest's chat format; the folder's own template is one only where it goes along."""
    return None if name == TOKENIZER_FORMAT and template.text is None else name


def _describe(name: str, kind: str, trained: Manifest | None, template: Template) -> dict[str, PairValue]:
    pairs: dict[str, PairValue] = {
        "general.type": "model",
        "general.name": name,
        "general.file_type": _FILE_TYPES[kind],
        "general.quantization_version": _QUANTIZATION_VERSION,
    }
    if trained and trained.license:
        pairs["general.license"] = trained.license
    if template.text is not None:
        pairs["tokenizer.chat_template"] = template.text
    return pairs


def _facts(
    config: ModelConfig, metadata: dict[str, PairValue], vocabulary: Vocabulary, template: Template, trained: Manifest | None
) -> dict[str, Any]:
    """The parent's, and where llama.cpp differs from the Hugging Face folder."""
    facts: dict[str, Any] = {**(trained.facts if trained else {}), "chat_template": template.origin}
    context = metadata[f"{metadata['general.architecture']}.context_length"]
    if context != config.require("max_position_embeddings"):
        facts["context_tokens"] = context
    if vocabulary.differences:
        facts["tokenizer_differences"] = vocabulary.differences
    return facts
