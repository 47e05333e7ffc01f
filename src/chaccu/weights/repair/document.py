"""One JSON file of a model folder: read although it is not quite JSON, and shown as it would be changed.

Tolerated on reading, and said: a byte order mark, UTF-16, commas before a closing bracket. Numbers are kept as they are,
however large.
"""

from __future__ import annotations

import difflib
import json
import re
from typing import Any

_MARKS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
# A string as a whole, so that a comma inside one is left alone; or a comma that nothing follows.
_TRAILING_COMMA = re.compile(r'("(?:\\.|[^"\\])*")|,(?=\s*[}\]])')
_INDENT = re.compile(r"\{\r?\n( +)\"")
_LONGEST_DIFFERENCE = 24
_LONGEST_LINE = 200


class Document:
    """A JSON file's text and value.

    `problem`: why other readers refuse the text ("" when they do not). `value` is None when it is no object or cannot be read.
    """

    def __init__(self, data: bytes) -> None:
        self.problem = ""
        self.value: dict[str, Any] | None = None
        found: list[str] = []
        encoding = next((encoding for mark, encoding in _MARKS if data.startswith(mark)), None)
        if encoding:
            found.append("a byte order mark" if encoding == "utf-8-sig" else "UTF-16")
        try:
            self.text = data.decode(encoding or "utf-8")
            try:
                value = json.loads(self.text)
            except ValueError:
                self.text = _TRAILING_COMMA.sub(lambda match: match[1] or "", self.text)
                value = json.loads(self.text)
                found.append("a comma before a closing bracket")
        except (ValueError, RecursionError) as error:
            self.text = ""
            self.problem = f"is no JSON ({error})"
            return
        if isinstance(value, dict):
            self.value = value
            self.problem = f"has {' and '.join(found)}" if found else ""
        else:
            self.problem = f"holds a {type(value).__name__} where an object is expected"

    def with_value(self, value: dict[str, Any]) -> Document:
        """The document with another value, indented as it was."""
        indent = _INDENT.search(self.text)
        return Document(write_value(value, indent=len(indent[1]) if indent else 2).encode())


def write_value(value: dict[str, Any], *, indent: int = 2) -> str:
    """The text of a JSON file."""
    return json.dumps(value, indent=indent, ensure_ascii=False) + "\n"


def show_difference(name: str, before: str, after: str) -> str:
    """A unified diff with one line around each change, cut where it is long."""
    lines = [
        line if len(line) <= _LONGEST_LINE else line[:_LONGEST_LINE] + "…"
        for line in difflib.unified_diff(before.splitlines(), after.splitlines(), name, name, n=1, lineterm="")
    ]
    if len(lines) > _LONGEST_DIFFERENCE:
        lines[_LONGEST_DIFFERENCE:] = [f"… {len(lines) - _LONGEST_DIFFERENCE} more lines"]
    return "\n".join(lines)
