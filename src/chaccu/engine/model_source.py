"""`ModelSource`: what a model's name on the command line stands for.

Accepted: an artifact folder (its manifest names the chat format), any Hugging Face folder or hub id, a `.gguf` file beside a
tokenizer.json, `scripted:NAME` for the scripted engine, and, with the URL of a server that has it, a mere name or a folder with
the model's tokenizer. Invariant: a chat format is named by the manifest or by the caller,
never guessed from a path or a tokenizer.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from chaccu.artifact import MANIFEST_NAME, Manifest, read_manifest
from chaccu.conversation import TOKENIZER_FORMAT, list_formats, load_format, resolve_format
from chaccu.errors import EngineError, UsageError
from chaccu.hub import could_be_hub_id, fetch_model

SCRIPTED_PREFIX = "scripted:"
_SCRIPTED_FORMAT = "chatml"
_SERVABLE_KINDS = ("gguf", "model", "base")


class ModelSource(msgspec.Struct, frozen=True, kw_only=True):
    """A model that is there: `name` to serve it under, its chat format's name, and the weights it holds.

    `gguf`: a GGUF file; `hf`: a folder with config.json and weights; `folder`: where tokenizer.json lies (None for a scripted
    model, and for one that a server has under a mere name). `url`: where that server's API is. `spec`: as it was named.
    """

    spec: str
    name: str
    chat_format: str
    folder: Path | None = None
    gguf: Path | None = None
    hf: Path | None = None
    url: str | None = None

    @property
    def is_scripted(self) -> bool:
        return self.folder is None and self.url is None


def resolve_model(spec: str, *, chat_format: str | None = None, name: str | None = None, url: str | None = None) -> ModelSource:
    """Find the model that `spec` names; with `url` the one that the server there has.

    `chat_format` overrides the manifest's. Raises `EngineError` when nothing is there or it holds no weights, `UsageError`
    when no chat format is named or it is unknown, `ArtifactError` for a damaged manifest.
    """
    if chat_format not in (None, TOKENIZER_FORMAT):
        load_format(chat_format)
    if spec.startswith(SCRIPTED_PREFIX):
        given = spec.removeprefix(SCRIPTED_PREFIX).partition("?")[0]
        if not given:
            raise UsageError(f"{spec!r} names no scripted model.", remedy="write scripted:NAME")
        return ModelSource(spec=spec, name=name or given, chat_format=chat_format or _SCRIPTED_FORMAT)
    path = Path(spec).expanduser()
    if url is not None and not path.is_dir():
        return ModelSource(spec=spec, name=name or spec, chat_format=chat_format or _declared_format(spec, None), url=url)
    if not path.exists():
        path = _fetch_from_hub(spec, chat_format)
    folder = path if path.is_dir() else path.parent
    gguf, hf = _find_weights(path) if url is None else (None, None)
    manifest = read_manifest(folder, kind=_SERVABLE_KINDS) if (folder / MANIFEST_NAME).is_file() else None
    named_format = chat_format or _declared_format(spec, manifest)
    resolve_format(named_format, folder)
    return ModelSource(
        spec=spec,
        name=name or (manifest.name if manifest and manifest.name else _name_of(path, spec)),
        chat_format=named_format,
        folder=folder,
        gguf=gguf,
        hf=hf,
        url=url,
    )


def _name_of(path: Path, spec: str) -> str:
    if "/" in spec and could_be_hub_id(spec) and not Path(spec).exists():
        return spec
    return path.resolve().stem if path.is_file() else path.resolve().name


def _declared_format(spec: str, manifest: Manifest | None) -> str:
    if manifest is not None and manifest.chat_format:
        return manifest.chat_format
    reason = "its manifest names none" if manifest else f"it has no {MANIFEST_NAME} to name one"
    raise UsageError(
        f"the chat format of {spec} is not known: {reason}, and a format is never guessed.",
        remedy=f"--format NAME, one of: {', '.join([TOKENIZER_FORMAT, *list_formats()])}",
    )


def _find_weights(path: Path) -> tuple[Path | None, Path | None]:
    """The GGUF file and the Hugging Face folder that `path` holds; at least one of them."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise EngineError(f"{path} is not a model: a single file must be a .gguf.", remedy="name the model's folder")
        return path, None
    ggufs = [path / "model.gguf"] if (path / "model.gguf").is_file() else sorted(path.glob("*.gguf"))
    if len(ggufs) > 1:
        names = ", ".join(file.name for file in ggufs)
        raise EngineError(f"{path} holds {len(ggufs)} GGUF files ({names}).", remedy="name the file to serve")
    has_hf = (path / "config.json").is_file() and any(path.glob("*.safetensors"))
    if not ggufs and not has_hf:
        raise EngineError(
            f"{path} holds no weights: neither a .gguf nor config.json with *.safetensors.",
            remedy="name a model folder that `chaccu weights` wrote, or a Hugging Face folder",
        )
    return (ggufs[0] if ggufs else None), (path if has_hf else None)


def _fetch_from_hub(spec: str, chat_format: str | None) -> Path:
    looks_local = "/" not in spec or not could_be_hub_id(spec)
    if looks_local or chat_format is None:
        hint = "" if looks_local else "; for a model of the hub add --format NAME, one of: " + ", ".join(list_formats())
        raise EngineError(f"there is no model at {spec}.", remedy="check the path" + hint)
    return fetch_model(spec, error=EngineError)
