"""The YAML header of a model card, which hubs read: between two lines of three dashes, before the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from chaccu.artifact import storage_errors
from chaccu.errors import WeightsError

CARD = "README.md"
_RULE = "---"


def read_card_header(folder: Path) -> dict[str, Any]:
    """What the header of the card in `folder` says; nothing without a card or a header. Raises `WeightsError` when it is not
    YAML."""
    path = folder / CARD
    if not path.is_file():
        return {}
    with storage_errors(path):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines or lines[0].strip() != _RULE or _RULE not in (line.strip() for line in lines[1:]):
        return {}
    end = next(at for at, line in enumerate(lines) if at and line.strip() == _RULE)
    try:
        header = yaml.safe_load("\n".join(lines[1:end]))
    except yaml.YAMLError as error:
        raise WeightsError(f"{path} has a damaged header: {error}.", remedy="mend the lines between its ---") from error
    return header if isinstance(header, dict) else {}
