"""The texts that go with what is released or published: model card and NOTICE, filled from manifests.

Cards are put together from templates, which have their parts on data and training in common.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
import msgspec
import yaml

from chaccu.artifact import Manifest
from chaccu.conversation import Conversation, Message, load_format
from chaccu.weights.ancestry import Ancestor
from chaccu.weights.data_statement import DataStatement
from chaccu.weights.fetch import LicenceTerms

_EXAMPLE = Conversation(messages=(Message("user", "Who are you?"),))
_ADAPTER_CHANGED = (
    "adapter_model.safetensors and adapter_config.json are a modification of {base}, made by fine-tuning with Chaccu."
)
_BLANK_LINES = re.compile(r"\n{3,}")


def render_card(
    manifest: Manifest,
    statement: DataStatement,
    *,
    terms: LicenceTerms | None,
    terms_file: str,
    package: str | None,
    weights_bytes: int,
) -> str:
    """The card, Markdown with the header that hubs read. `terms`: of a known licence (None: `terms_file` speaks for itself);
    `package`: the packaged model that is the base, by which it can be run."""
    return _fill(
        "card.md.jinja",
        name=manifest.name,
        license=manifest.license,
        base_name=manifest.settings["model"],
        chat_format=manifest.chat_format,
        example=_example(str(manifest.chat_format)),
        tokenizer_sha256=manifest.tokenizer_sha256,
        settings=manifest.settings,
        facts=manifest.facts,
        versions=manifest.versions,
        data=statement,
        terms=terms,
        terms_file=terms_file,
        package=package,
        weights_bytes=weights_bytes,
    )


class PublishedFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the card of a published artifact is filled from. `what`: a sentence on what it is; `header`: the YAML's values;
    `training`: the manifest of the training that it comes from, with `data` where that is known; `terms`: of a known
    licence."""

    repo: str
    name: str
    what: str
    manifest: Manifest
    header: Mapping[str, Any]
    base_name: str | None
    ancestors: Sequence[Ancestor]
    training: Manifest | None
    data: DataStatement | None
    terms: LicenceTerms | None
    terms_file: str | None


def render_published_card(card: PublishedFacts) -> str:
    """The card of an artifact of any kind, Markdown with the header that hubs read."""
    manifest, training = card.manifest, card.training
    header = yaml.safe_dump(dict(card.header), sort_keys=False, allow_unicode=True)
    return _fill(
        "card_published.md.jinja",
        **{key: getattr(card, key) for key in ("repo", "name", "what", "manifest", "base_name", "ancestors", "data", "terms")},
        terms_file=card.terms_file,
        header=f"---\n{header}---\n",
        example=_example(manifest.chat_format) if manifest.chat_format else None,
        recipe={key: value for key, value in manifest.settings.items() if _is_short(value)},
        inputs=training.inputs if training else {},
        facts=training.facts if training else None,
        settings=training.settings if training else {},
        versions=training.versions if training else {},
    )


def _is_short(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool)) and len(str(value)) < 100


def _example(chat_format: str) -> str:
    return load_format(chat_format).render(_EXAMPLE, pending=True).text


def _fill(template: str, **values: Any) -> str:
    folder = resources.files("chaccu.weights")
    environment = jinja2.Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
    )
    return _BLANK_LINES.sub("\n\n", environment.get_template(template).render(**values)).strip() + "\n"


def render_notice(
    base_name: str,
    *,
    terms: LicenceTerms | None,
    terms_file: str,
    changed: str = _ADAPTER_CHANGED,
) -> str:
    """The NOTICE file: the base's own notice first, then what was changed (`{base}` is the base's name) and what binds whoever
    passes it on."""
    parts = [
        f"{terms.notice}." if terms else f"{base_name} is provided under the terms in {terms_file}.",
        f"{changed.format(base=base_name)} What they are merged into is modified too.",
    ]
    if terms:
        parts.append(
            f"A copy of the {terms.title} is in {terms_file}. You must not use these files, or anything made from them, "
            f"{terms.restrictions}. Whoever you pass them on to is bound by the same restrictions; hand on this notice and "
            "that copy with them."
        )
    return "\n\n".join(parts) + "\n"
