"""Faults of the tokenizer's files: no tokenizer.json, more tokens than the embedding has rows, no or another chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jinja2

from chaccu.conversation.format import load_format
from chaccu.conversation.template_export import export_template
from chaccu.conversation.template_format import load_template_format
from chaccu.errors import FormatError, WeightsError
from chaccu.weights.repair.draft import (
    ADDED_TOKENS,
    CONFIG,
    SENTENCEPIECE,
    TEMPLATE,
    TOKENIZER,
    TOKENIZER_CONFIG,
    Draft,
    Finding,
)
from chaccu.weights.repair.token_faults import read_text
from chaccu.weights.repair.vocabulary import read_vocabulary
from chaccu.weights.sentencepiece_file import SentencePieceModel, read_sentencepiece

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer

# What tells an equal tokenizer from one that is nearly so: runs of spaces, digits, words that begin and end anywhere, other
# scripts, characters that are no pieces, texts that look like control tokens.
_PROBES = (
    *("", " ", "   ", "a", "Hello, world!", "  two  spaces ", "\n\n\tdef f(x):\n    return x**2\n", "3.14159 and 1,000,000"),
    *("The quick brown fox jumps over the lazy dog.", "unbelievably internationalization", "aaaaaaaaaaaaaaaaaaaaaaa"),
    *(
        "Größe, façade, naïve, señor",
        "Быстрая лиса",
        "素早い茶色の狐",
        "الثعلب البني",
        "🦙 llama 👩‍💻",
        "\x00\x7f\ufffd",
        "don't can't won't",
    ),
    *("USER: What is a vicuña? ASSISTANT:", "[INST] <<SYS>> hi <</SYS>> [/INST]", "https://example.org/a_b?c=d&e=%20f"),
)


def find_missing_tokenizer(draft: Draft) -> Iterator[Finding]:
    """No tokenizer.json, which Chaccu reads, where SentencePiece's model is there to build an equal one of."""
    if TOKENIZER in draft.documents:
        return
    path = draft.folder / SENTENCEPIECE
    own_code = (draft.get(TOKENIZER_CONFIG) or {}).get("auto_map") or {}
    if isinstance(own_code, list) or "AutoTokenizer" in own_code:
        yield Finding(
            TOKENIZER,
            "is missing, and the folder's own code would make the tokenizer, which is not run",
            "save it once with transformers, if you trust that code",
            mendable=False,
        )
        return
    if not path.is_file():
        yield Finding(TOKENIZER, "is missing, as is tokenizer.model", "fetch the model's tokenizer", mendable=False)
        return
    try:
        model = read_sentencepiece(path)
        if model.obstacle:
            raise WeightsError(f"{SENTENCEPIECE} has no equal BPE: {model.obstacle}.", remedy="save it once with transformers")
        tokenizer = _build_tokenizer(draft, model)
        checked = _check_equal(path, model, tokenizer)
    except WeightsError as error:
        yield Finding(TOKENIZER, f"is missing; {error.message.rstrip('.')}", error.remedy, mendable=False)
        return
    text = tokenizer.to_str(pretty=False)
    draft.contents[TOKENIZER] = text
    draft.vocabulary = read_vocabulary(json.loads(text))
    yield Finding(
        TOKENIZER,
        f"is missing, and {SENTENCEPIECE} is there",
        f"is built of it, an equal BPE of {len(model.pieces):,} pieces{checked}",
    )


def _build_tokenizer(draft: Draft, model: SentencePieceModel) -> Tokenizer:
    """With the tokens that the folder adds, and with BOS before a text unless the folder says otherwise."""
    from tokenizers import AddedToken, processors

    from chaccu.weights.gguf_tokenizer import add_named_tokens, build_sentencepiece

    vocabulary = {piece: index for index, piece in enumerate(model.pieces)}
    if len(vocabulary) < len(model.pieces):
        raise WeightsError(f"{SENTENCEPIECE} has a piece twice.")
    tokenizer = build_sentencepiece(vocabulary, model.scores, unknown=model.unknown, adds_space=model.adds_space)
    add_named_tokens(tokenizer, model.pieces, model.types)
    for index, token in sorted(_added_tokens(draft).items()):
        tokenizer.add_tokens([AddedToken(**token)])
        if tokenizer.token_to_id(token["content"]) != index:
            raise WeightsError(f"the added token {token['content']} has the id {index}, which is not the next one.")
    config = draft.get(TOKENIZER_CONFIG) or {}
    bos = read_text(config.get("bos_token")) or "<s>"
    if config.get("add_bos_token", True) and tokenizer.token_to_id(bos) is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def _added_tokens(draft: Draft) -> dict[int, dict[str, Any]]:
    """What the folder adds to SentencePiece's pieces, by id, as `AddedToken` takes it."""
    added = {
        index: {"content": text, "normalized": False}
        for text, index in (draft.get(ADDED_TOKENS) or {}).items()
        if type(index) is int
    }
    kept = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    decoder = (draft.get(TOKENIZER_CONFIG) or {}).get("added_tokens_decoder") or {}
    for index, token in decoder.items():
        if isinstance(token, Mapping) and read_text(token):
            added[int(index)] = {key: token[key] for key in kept if key in token}
    return added


def _check_equal(path: Path, model: SentencePieceModel, tokenizer: Tokenizer) -> str:
    """Compare with SentencePiece itself, where it is installed, on texts and on every piece; says so."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        return ""
    processor = SentencePieceProcessor(model_file=str(path))
    normal = [piece.replace("▁", " ") for piece, kind in zip(model.pieces, model.types, strict=True) if kind == 1]
    texts = [*_PROBES, *(f"x{piece}y {piece}" for piece in normal)]
    wanted = processor.encode(texts)
    for text, ids, encoding in zip(texts, wanted, tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
        if ids != encoding.ids:
            raise WeightsError(
                f"{SENTENCEPIECE} has no equal BPE: it writes {text!r} as {ids}, which would be {encoding.ids}.",
                remedy="save it once with transformers, and compare the ids",
            )
    return f", as SentencePiece itself confirms on {len(texts):,} texts"


def find_missing_rows(draft: Draft) -> Iterator[Finding]:
    """More tokens than the embedding has rows: a text with one of them stops the model, or reads another's memory."""
    embedding, vocabulary = draft.find_embedding(), draft.vocabulary
    if embedding is None or vocabulary is None or vocabulary.size <= embedding.shape[0]:
        return
    rows, size = embedding.shape[0], vocabulary.size
    problem = f"has {size:,} tokens, and {embedding.name} {rows:,} rows"
    if not draft.options.grow_embeddings:
        remedy = (
            "--grow-embeddings adds rows, each the mean of all others; or take the tokenizer that the model was trained with"
        )
        yield Finding(TOKENIZER, problem, remedy, mendable=False)
        return
    draft.grown_rows = size
    draft.rewriting.append("rows for tokens")
    config = draft.get(CONFIG)
    diff = ""
    if config is not None:
        is_inner = draft.text_config is not config
        inner = {**draft.text_config, "vocab_size": size}
        diff = draft.put(CONFIG, {**config, "text_config": inner} if is_inner else inner)
    yield Finding(TOKENIZER, problem, f"{size - rows} rows are added, each the mean of all others", diff=diff)


def find_wrong_template(draft: Draft) -> Iterator[Finding]:
    """A chat template that is not that of the format asked for; without one, a template that is malformed or stands in two
    forms."""
    config = draft.get(TOKENIZER_CONFIG) or {}
    file = draft.folder / TEMPLATE
    in_file = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None
    held = in_file if in_file is not None else config.get("chat_template")
    name = draft.options.chat_format
    if name is not None:
        yield from _find_other_template(draft, name, held)
    elif isinstance(held, str):
        try:
            load_template_format(held)
        except FormatError as error:
            if not isinstance(error.__cause__, jinja2.TemplateSyntaxError):
                draft.notes.append(f"Chaccu cannot follow the chat template: {error.message}")
                return
            yield Finding(
                TEMPLATE if in_file is not None else TOKENIZER_CONFIG,
                error.message.replace("of the given text ", "").rstrip("."),
                "--format NAME writes that of one of Chaccu's formats",
                mendable=False,
            )
            return
        if in_file is not None and isinstance(config.get("chat_template"), str) and config["chat_template"] != in_file:
            diff = draft.put(TOKENIZER_CONFIG, {key: value for key, value in config.items() if key != "chat_template"})
            yield Finding(
                TOKENIZER_CONFIG,
                f"has another chat_template than {TEMPLATE}, which stands before it",
                "is taken out",
                diff=diff,
            )
    elif held is None:
        draft.notes.append("there is no chat template: --format NAME writes that of one of Chaccu's formats.")


def _find_other_template(draft: Draft, name: str, held: Any) -> Iterator[Finding]:
    config = draft.get(TOKENIZER_CONFIG) or {}
    bos, eos = read_text(config.get("bos_token")), read_text(config.get("eos_token"))
    adds_bos = draft.vocabulary is not None and draft.vocabulary.adds_bos
    try:
        wanted = export_template(load_format(name), bos_token=bos, eos_token=eos, adds_bos=adds_bos)
    except FormatError as error:
        yield Finding(TEMPLATE, error.message.rstrip("."), error.remedy, mendable=False)
        return
    if held == wanted and "chat_template" not in config:
        return
    problem = "is missing" if held is None else f"is not that of the format {name}"
    diff = draft.put_text(TEMPLATE, wanted) if held != wanted or not (draft.folder / TEMPLATE).is_file() else ""
    if "chat_template" in config:
        draft.put(TOKENIZER_CONFIG, {key: value for key, value in config.items() if key != "chat_template"})
    yield Finding(TEMPLATE, problem, f"is written for {name}, as Chaccu renders it", diff=diff)
