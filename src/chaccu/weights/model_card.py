"""The texts that go with a released adapter: model card and NOTICE, filled from manifests."""

from __future__ import annotations

import re
from importlib import resources

import jinja2

from chaccu.artifact import Manifest
from chaccu.conversation import Conversation, Message, load_format
from chaccu.weights.data_statement import DataStatement
from chaccu.weights.fetch import LicenceTerms

_EXAMPLE = Conversation(messages=(Message("user", "Who are you?"),))
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
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((resources.files("chaccu.weights") / "card.md.jinja").read_text(encoding="utf-8"))
    text = template.render(
        name=manifest.name,
        license=manifest.license,
        base_name=manifest.settings["model"],
        chat_format=manifest.chat_format,
        example=load_format(str(manifest.chat_format)).render(_EXAMPLE, pending=True).text,
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
    return _BLANK_LINES.sub("\n\n", text).strip() + "\n"


def render_notice(base_name: str, *, terms: LicenceTerms | None, terms_file: str) -> str:
    """The NOTICE file: the base's own notice first, then what was changed and what binds whoever passes it on."""
    parts = [
        f"{terms.notice}." if terms else f"{base_name} is provided under the terms in {terms_file}.",
        f"adapter_model.safetensors and adapter_config.json are a modification of {base_name}, made by fine-tuning with "
        "Chaccu. What they are merged into is modified too.",
    ]
    if terms:
        parts.append(
            f"A copy of the {terms.title} is in {terms_file}. You must not use these files, or anything made from them, "
            f"{terms.restrictions}. Whoever you pass them on to is bound by the same restrictions; hand on this notice and "
            "that copy with them."
        )
    return "\n\n".join(parts) + "\n"
