"""YAML of configurations and word lists, in which words stay words.

Only `true` and `false` are booleans, as in YAML 1.2: `off`, `on`, `yes` and `no` are text, so that `email: off`, the language
`no` and the country `NO` are what they look like. Dates are text too. All else is as PyYAML's safe loader has it.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_BOOLEAN, _TIMESTAMP = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp"


class _PlainLoader(yaml.SafeLoader):
    """The safe loader with the booleans of YAML 1.2 and no dates."""


_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOLEAN, _TIMESTAMP)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_PlainLoader.add_implicit_resolver(_BOOLEAN, re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF"))


def parse_yaml(text: str | bytes) -> Any:
    """The value of a YAML document; None when it is empty. Raises `yaml.YAMLError`."""
    return yaml.load(text, _PlainLoader)
