"""A model folder as it is, and as it would be once it is mended.

Every fault's function looks at the draft and plans its mending there, so that the next one sees the folder as the ones before
leave it. Invariant: a draft only reads the folder. `writing` carries out what it plans.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from chaccu.artifact import storage_errors
from chaccu.weights.checkpoint import INDEX_NAME, Checkpoint
from chaccu.weights.pickled_shards import PICKLED_INDEX_NAME
from chaccu.weights.repair.document import Document, show_difference, write_value
from chaccu.weights.repair.vocabulary import Vocabulary, read_vocabulary
from chaccu.weights.safetensors_file import TensorSpec

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL_TOKENS, ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"
SENTENCEPIECE, TEMPLATE = "tokenizer.model", "chat_template.jinja"
JSON_FILES = (
    *(CONFIG, GENERATION, TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS, ADDED_TOKENS),
    *(INDEX_NAME, PICKLED_INDEX_NAME),
)
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_HEADS = ("lm_head.weight", "embed_out.weight")


class Finding(msgspec.Struct, frozen=True):
    """What is wrong in which file. `mending` says what `--write` does, or, where it cannot be mended, what to do instead;
    `diff` is the change to the file, as a unified diff."""

    file: str
    problem: str
    mending: str
    mendable: bool = True
    diff: str = ""
    fault: str = ""


class RepairOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`chat_format`: a Chaccu format whose template the folder is to have. `grow_embeddings`: whether tokens without a row in
    the embedding get the mean of all rows."""

    chat_format: str | None = None
    grow_embeddings: bool = False


class Draft:
    """See the module. `weights` are set by the faults of weights, and stay None where there are none that can be read."""

    def __init__(self, folder: Path, options: RepairOptions) -> None:
        self.folder = folder
        self.options = options
        self.findings: list[Finding] = []
        # What is worth knowing and is not wrong.
        self.notes: list[str] = []
        self.documents: dict[str, Document] = {}
        for name in JSON_FILES:
            if (folder / name).is_file():
                with storage_errors(folder / name):
                    self.documents[name] = Document((folder / name).read_bytes())
        # New contents by file name, and files to take away.
        self.contents: dict[str, str] = {}
        self.removed: list[str] = []
        self.weights: Checkpoint | None = None
        # Why all weights are to be written anew; none: they stay.
        self.rewriting: list[str] = []
        self.left_out: set[str] = set()
        self.grown_rows: int | None = None
        # Files that the manifest lists otherwise than they are.
        self.stale: set[str] = set()
        self.vocabulary: Vocabulary | None = None
        if tokenizer := self.get(TOKENIZER):
            self.vocabulary = read_vocabulary(tokenizer)
            # Large, and never looked at again.
            self.documents[TOKENIZER].value = {}

    def get(self, name: str) -> dict[str, Any] | None:
        """The object in a JSON file as it will be; None where there is none that can be read."""
        document = self.documents.get(name)
        return document.value if document and name not in self.removed else None

    def put(self, name: str, value: Mapping[str, Any]) -> str:
        """Plan another object for a JSON file, or a new file; returns the difference."""
        old = self.documents.get(name)
        new = old.with_value(dict(value)) if old else Document(write_value(dict(value)).encode())
        before = "" if old is None or old.value is None else write_value(old.value)
        self.documents[name] = new
        self.contents[name] = new.text
        return show_difference(name, before, write_value(dict(value)))

    def put_text(self, name: str, text: str) -> str:
        """Plan the text of a file; returns the difference."""
        path = self.folder / name
        before = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        self.contents[name] = text
        return show_difference(name, before, text)

    def remove(self, names: Iterable[str]) -> None:
        """Plan that files are taken away."""
        for name in names:
            self.contents.pop(name, None)
            if name not in self.removed:
                self.removed.append(name)

    @property
    def config(self) -> dict[str, Any]:
        """config.json, empty where it cannot be read."""
        return self.get(CONFIG) or {}

    @property
    def text_config(self) -> dict[str, Any]:
        """The part of the config that is the language model's."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    def find_embedding(self) -> TensorSpec | None:
        """The one tensor with a row a token, if it can be told."""
        return self._find_tensor(_EMBEDDINGS)

    def find_head(self) -> TensorSpec | None:
        """The one projection onto the vocabulary, if there is one."""
        return self._find_tensor(_HEADS)

    def _find_tensor(self, endings: tuple[str, ...]) -> TensorSpec | None:
        specs = self.weights.entries if self.weights else {}
        found = [
            spec
            for name, spec in specs.items()
            if name not in self.left_out and name.endswith(endings) and len(spec.shape) == 2
        ]
        return found[0] if len(found) == 1 else None

    @property
    def rows(self) -> int | None:
        """Ids that the embedding knows, or else that the config speaks of."""
        embedding = self.find_embedding()
        if embedding is not None:
            return embedding.shape[0]
        size = self.text_config.get("vocab_size")
        return size if type(size) is int else None
