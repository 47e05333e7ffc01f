"""The gate before weights leave: what is exported gives the ids that training saw, or is not written.

Training saw one tokenizer, named by its hash in the manifest, through one chat format. An export has a tokenizer.json, in GGUF
a vocabulary too, and a chat template for other programs. Invariants: conversations that try everything give equal ids with each
of them, or the export is refused with the token at which they part; a template that writes another text than the format goes no
further. It ignores weights.
"""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from chaccu.artifact import MANIFEST_NAME, Manifest, copy_files, read_manifest, write_json
from chaccu.conversation import (
    TOKENIZER_FILES,
    TOKENIZER_FORMAT,
    ChatFormat,
    Conversation,
    Message,
    TextTokenizer,
    encode_conversation,
    export_template,
    load_format,
    read_template,
    resolve_format,
    writes_same,
)
from chaccu.errors import FormatError, WeightsError
from chaccu.weights.gguf_file import GgufFile
from chaccu.weights.gguf_tokenizer import read_tokenizer

_TEMPLATE_FILE, _CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"
_CODE = 'def f(x: int) -> str:\n\tif x:\n        return f"{x:>8}"  # tab, then spaces\n\n\n    return "\\n"\r\n'
_UNICODE = "naïve Zürich Ωμέγα приве́т 漢字かな 한국어 العربية עברית ไทย 🦙👩‍🚀🏳️‍🌈 ½ ² Ⅷ \u00a0\u2003\u200b\ufeff e\u0301 é"
_SPACES = "one two  three   four    five                    twenty\t\ttabs\n\n\nlines \n \n end"
_NUMBERS = "0 7 42 365 1984 31,415,926.535 -1e-9 0xFF 1/2 'tis we'll I'D they'Re <0x0A> $5.00 100% #!@^&*()[]{}|\\~`"


def build_probes(tokenizer: TextTokenizer) -> list[Conversation]:
    """Conversations with code, runs of spaces, scripts, numbers and the tokenizer's own control tokens spelled in messages: of
    one round and of several, with a system text and without."""
    spelled = " ".join(tokenizer.control_tokens[:48]) + " </s><s>[INST] <|im_start|>system\nx<|im_end|>"
    texts = (_CODE, _UNICODE, _SPACES, _NUMBERS, spelled)
    rounds = [(Message("user", text), Message("assistant", text.strip())) for text in texts]
    every = tuple(message for one in rounds for message in one)
    short = (Message("user", "Hello there."), Message("assistant", "Hi."))
    return [
        Conversation(messages=short),
        Conversation(messages=short, system="Answer in one word."),
        *(Conversation(messages=one) for one in rounds),
        Conversation(messages=every, system=_UNICODE),
        Conversation(messages=(*every, Message("user", "And?"))),
    ]


def trained_manifest(folder: Path) -> Manifest | None:
    """What the folder's manifest says, once its tokenizer is found to be the one that the weights were trained with.

    Raises `WeightsError` when it is another; a folder without a manifest says nothing.
    """
    if not (folder / MANIFEST_NAME).is_file():
        return None
    manifest = read_manifest(folder)
    if manifest.tokenizer_sha256 is not None:
        _require_trained(folder, manifest, TextTokenizer.load(folder))
    return manifest


def pass_gate(folder: Path, manifest: Manifest) -> None:
    """Check the tokenizer that was copied into `folder` against the `manifest` that it is to get, and leave there the one chat
    template that writes what its chat format does.

    Raises `WeightsError` when training saw another tokenizer; a folder without one has nothing to check.
    """
    if not (folder / "tokenizer.json").is_file():
        return
    tokenizer = TextTokenizer.load(folder)
    _require_trained(folder, manifest, tokenizer)
    put_template(folder, settle_template(read_template(folder), tokenizer, find_format(manifest.chat_format, folder)))


def _require_trained(folder: Path, manifest: Manifest, tokenizer: TextTokenizer) -> None:
    if manifest.tokenizer_sha256 not in (None, tokenizer.sha256):
        raise WeightsError(
            f"{folder} has another tokenizer than its weights were trained with: {tokenizer.sha256[:12]}… and "
            f"{str(manifest.tokenizer_sha256)[:12]}… are their SHA-256.",
            remedy="put the tokenizer.json back that its manifest lists",
        )


def find_format(name: str | None, folder: Path) -> ChatFormat | None:
    """The chat format of that name, of the folder's own template where it is `tokenizer`."""
    return None if name is None else resolve_format(name, folder)


def require_same_ids(trained: TextTokenizer, exported: TextTokenizer, chat_format: ChatFormat | None, where: str) -> None:
    """Raise `WeightsError` unless both give the same ids to every probe in `chat_format` (None: texts one after the other).

    `where`: what has the tokenizer `exported`, for the message.
    """
    chat_format = chat_format or load_format("raw")
    for number, probe in enumerate(build_probes(trained)):
        try:
            before = encode_conversation(probe, chat_format, trained).ids
        except FormatError:
            continue  # a format may take no system text, or roles in one order alone
        after = encode_conversation(probe, chat_format, exported).ids
        if before == after:
            continue
        pairs = zip(before, after, strict=False)
        at = next((index for index, (one, other) in enumerate(pairs) if one != other), min(len(before), len(after)))
        raise WeightsError(
            f"{where} gives other ids than training saw: in probe {number} (format {chat_format.name}) they part at token "
            f"{at}: {_spell(trained, before, at)} and {_spell(exported, after, at)}.",
            remedy="serve the Hugging Face folder itself",
        )


def require_gguf_ids(gguf: Path, trained: TextTokenizer, chat_format: ChatFormat | None) -> None:
    """As `require_same_ids`, for the vocabulary that was written into a GGUF file."""
    file = GgufFile(gguf)
    try:
        backend, config = read_tokenizer(file)
    finally:
        file.close()
    exported = TextTokenizer(backend, bos_token=config.get("bos_token", ""), eos_token=config.get("eos_token", ""))
    if exported.adds_bos != trained.adds_bos:
        raise WeightsError(f"{gguf.name} begins a text with a BOS token: {exported.adds_bos}; training saw {trained.adds_bos}.")
    require_same_ids(trained, exported, chat_format, gguf.name)


class Template(msgspec.Struct, frozen=True):
    """A chat template for other programs. `text`: None where there is none; `origin`: "folder", "format" or "none"."""

    text: str | None
    origin: str


def settle_template(own: str | None, tokenizer: TextTokenizer, chat_format: ChatFormat | None) -> Template:
    """A folder's `own` template where it writes what the format does (or no format is named), else the format's, if Jinja of
    other programs can say it."""
    if chat_format is None or chat_format.name == TOKENIZER_FORMAT:
        return Template(own, "folder" if own else "none")
    probes, names = build_probes(tokenizer), {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    if own and writes_same(own, chat_format, probes, **names, adds_bos=tokenizer.adds_bos):
        return Template(own, "folder")
    try:
        return Template(export_template(chat_format, probes=probes, **names, adds_bos=tokenizer.adds_bos), "format")
    except FormatError:
        return Template(None, "none")


def copy_tokenizer(source: Path, folder: Path, template: Template) -> None:
    """Copy the tokenizer's files into `folder`, with `template` as their only chat template."""
    copy_files(source, folder, TOKENIZER_FILES)
    put_template(folder, template)


def put_template(folder: Path, template: Template) -> None:
    """Make `template` the only one of the tokenizer's files in `folder`."""
    if template.origin == "folder":
        return
    (folder / _TEMPLATE_FILE).unlink(missing_ok=True)
    if template.text is not None:
        (folder / _TEMPLATE_FILE).write_text(template.text, encoding="utf-8")
    config_file = folder / _CONFIG_FILE
    if config_file.is_file():
        config = json.loads(config_file.read_text(encoding="utf-8"))
        if config.pop("chat_template", None) is not None:
            write_json(config_file, config)


def _spell(tokenizer: TextTokenizer, ids: list[int], at: int) -> str:
    return f"{ids[at]} ({tokenizer.token_text(ids[at])!r})" if at < len(ids) else "the end"
