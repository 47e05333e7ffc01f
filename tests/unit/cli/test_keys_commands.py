"""`chaccu keys`: a key is shown once, on stdout alone; lists show ids and no secrets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from chaccu.cli.keys import app
from chaccu.errors import UsageError
from chaccu.serve.gateway.access.keys import KeyFile


def run(*arguments: str) -> str:
    return CliRunner().invoke(app, arguments, catch_exceptions=False).stdout


def test_a_key_is_made_listed_and_revoked(tmp_path: Path) -> None:
    file = str(tmp_path / "keys.json")
    shown = run("create", "--keys", file, "--name", "alice").strip()
    made = json.loads(run("create", "--keys", file, "--name", "gpu", "--scope", "worker", "--model", "m", "--json"))
    assert (made["scopes"], made["models"], made["name"]) == (["worker"], ["m"], "gpu")
    listed = run("list", "--keys", file)
    first, second = listed.splitlines()
    assert "alice  chat  all models  since " in first
    assert "gpu  worker  m  since " in second
    run("revoke", made["id"], "--keys", file)
    revoked = json.loads(run("list", "--keys", file, "--json"))
    assert [bool(key["revoked"]) for key in revoked] == [False, True]
    for text in (listed, json.dumps(revoked)):
        assert shown not in text
        assert made["key"] not in text
        assert KeyFile(Path(file)).read()[0].hash not in text


def test_a_wrong_scope_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no scope 'chatt'"):
        run("create", "--keys", str(tmp_path / "k"), "--name", "a", "--scope", "chatt")
