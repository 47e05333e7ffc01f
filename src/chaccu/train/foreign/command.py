"""A training command in a shell script: its flags, its script and its processes, read without running anything.

Invariants: a flag is never lost: what is not the script's is the launcher's, and a word that belongs to no flag is named.
Variables are put in where the script itself sets them, and left as they stand where it does not. Ignored: loops, arrays,
functions.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import msgspec

from chaccu.errors import RecipeError

_TRAINER_FLAGS = {"model_name_or_path", "base_model", "data_path", "dataset", "dataset_name", "output_dir", "learning_rate"}
# Of torchrun, deepspeed and accelerate, which may stand behind the script where someone pastes flags alone.
_PER_HOST, _HOSTS, _ALL = ("nproc_per_node", "num_gpus"), ("nnodes", "num_nodes", "num_machines"), ("num_processes",)
COUNTING_FLAGS = (*_PER_HOST, *_HOSTS, *_ALL)
_LAUNCHER_FLAGS = {*_PER_HOST, *_HOSTS, *_ALL, "node_rank", "master_addr", "master_port", "standalone", "rdzv_backend"}
_OPERATORS = "();<>|&"
_HIDDEN = {sign: chr(0xE010 + number) for number, sign in enumerate(f"#{_OPERATORS}")}
_QUOTED = re.compile(r"'[^']*'|\"(?:\\.|[^\"\\])*\"")
_HELD = ("\ue000", "\ue001")
_SUBSTITUTION = re.compile(r"\$\((?:[^()]|\([^()]*\))*\)|`[^`]*`")
_REDIRECTION = re.compile(r"(?<=\s)(?:[012]|&)?>{1,2}\s*(?:&\d|[^\s;|&]+)")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$(\w+)|\$\{(\w+)(?::?-([^}]*))?\}")


class TrainingCommand(msgspec.Struct, frozen=True, kw_only=True):
    """`flags`: by name, with underscores: a text, a list of texts, or True where no value stands. `processes`: None where the
    command does not say. `repeated`: flags given twice, of which the last counts. `loose`: words of no flag. `others`: further
    training commands in the text."""

    script: str | None
    flags: dict[str, Any]
    repeated: list[str]
    launcher: list[str]
    environment: list[str]
    processes: int | None
    loose: list[str]
    others: int


def script_stem(command: TrainingCommand | None) -> str:
    """Name of the command's script or module without folders and ending; empty where there is none."""
    script = command.script if command and command.script else ""
    return re.split(r"[./\\]", script.removesuffix(".py"))[-1]


def find_training_command(text: str) -> TrainingCommand | None:
    """The first command of a script that has a trainer's flags, or None.

    Raises `RecipeError` where there is none before quotes that do not end.
    """
    variables: dict[str, str] = {}
    found: list[TrainingCommand] = []
    commands, unfinished = _split_commands(text)
    for words in commands:
        words = words[1:] if words[:1] == ["export"] else words
        assigned = [match for match in takewhile(bool, map(_ASSIGNMENT.fullmatch, words)) if match]
        rest = words[len(assigned) :]
        if not rest:
            variables.update((match[1], _expand(match[2], variables)) for match in assigned)
            continue
        command = _parse_command(list(_expand_words(rest, variables)), [match[1] for match in assigned])
        if _TRAINER_FLAGS & command.flags.keys():
            found.append(command)
    if unfinished and not found:
        raise RecipeError(f"a quote does not end in: {unfinished[:60]!r}.", remedy="close it")
    return msgspec.structs.replace(found[0], others=len(found) - 1) if found else None


def _split_commands(text: str) -> tuple[list[list[str]], str]:
    """The words of each command, quotes taken off, and what follows a quote that does not end."""
    text = re.sub(r"(?m)^[ \t]*#.*\n?", "", text.replace("\r\n", "\n"))
    text = re.sub(r"\\[ \t]*(?:\n|\Z)", " ", text)
    held: list[str] = []

    def hold(match: re.Match[str]) -> str:
        held.append(match[0])
        return f"{_HELD[0]}{len(held) - 1}{_HELD[1]}"

    commands: list[list[str]] = []
    pending = ""
    for line in _SUBSTITUTION.sub(hold, text).split("\n"):
        pending += line
        try:
            words = _split_line(_REDIRECTION.sub(" ", pending))
        except ValueError:
            pending += "\n"  # inside quotes that go on
            continue
        pending = ""
        commands.append([])
        for word in words:
            if word and set(word) <= set(_OPERATORS):
                commands.append([])
            else:
                commands[-1].append(re.sub(f"{_HELD[0]}(\\d+){_HELD[1]}", lambda match: held[int(match[1])], word))
    return commands, pending.strip()


def _split_line(line: str) -> list[str]:
    # shlex would let a comment begin inside a word, and does not tell an operator in quotes from a bare one.
    line = re.sub(r"(?<=\S)#", _HIDDEN["#"], line)
    line = _QUOTED.sub(lambda match: "".join(_HIDDEN.get(sign, sign) for sign in match[0]), line)
    lexer = shlex.shlex(line, posix=True, punctuation_chars=_OPERATORS)
    lexer.whitespace_split = True
    words = list(lexer)
    for sign, hidden in _HIDDEN.items():
        words = [word.replace(hidden, sign) for word in words]
    return words


def _expand(text: str, variables: dict[str, str]) -> str:
    return _VARIABLE.sub(lambda match: variables.get(match[1] or match[2], match[3] or match[0]), text)


def _expand_words(words: list[str], variables: dict[str, str]) -> Iterator[str]:
    """`words` with known variables and the home folder put in; one that holds flags becomes several words."""
    for word in words:
        expanded = _expand(word, variables)
        if expanded.startswith("~/"):
            expanded = str(Path(expanded).expanduser())
        if expanded != word and expanded.startswith("--") and not word.startswith("--"):
            yield from shlex.split(expanded)
        else:
            yield expanded


def _parse_command(words: list[str], environment: list[str]) -> TrainingCommand:
    place = _find_script(words)
    ahead, _, _ = _parse_flags(words[: place or 0])
    flags, repeated, loose = _parse_flags(words[0 if place is None else place + 1 :])
    ahead |= {name: flags.pop(name) for name in list(flags) if name in _LAUNCHER_FLAGS}
    return TrainingCommand(
        script=None if place is None else words[place],
        flags=flags,
        repeated=repeated,
        launcher=list(ahead),
        environment=environment,
        processes=_count_processes(ahead),
        loose=loose,
        others=0,
    )


def _find_script(words: list[str]) -> int | None:
    """Place of the script's or module's name among the words, or None."""
    for place, word in enumerate(words):
        if word.endswith(".py") or (place and words[place - 1] == "-m" and not word.startswith("torch.distributed")):
            return place
    flags = [place for place, word in enumerate(words) if word.startswith("--")]
    return flags[0] - 1 if flags and flags[0] > 0 else None


def _parse_flags(words: list[str]) -> tuple[dict[str, Any], list[str], list[str]]:
    flags: dict[str, Any] = {}
    repeated: list[str] = []
    loose: list[str] = []
    name = None
    for word in words:
        if re.match(r"--\w", word):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            if name in flags:
                repeated.append(name)
            flags[name] = value if equals else True
        elif name is None or re.match(r"-[A-Za-z]", word):
            loose.append(word)
            name = None
        elif flags[name] is True:
            flags[name] = word
        else:
            flags[name] = [*(flags[name] if isinstance(flags[name], list) else [flags[name]]), word]
    return flags, repeated, loose


def _count_processes(launcher: dict[str, Any]) -> int | None:
    """What a launcher's flags come to, or None where they do not say a number (`gpu`, `auto`, a variable)."""
    counts = {name: int(value) for name, value in launcher.items() if isinstance(value, str) and value.isdecimal()}
    hosts = next((counts.get(name) for name in _HOSTS if name in launcher), 1)
    for name in _ALL:
        if name in launcher:
            return counts.get(name)
    for name in _PER_HOST:
        if name in launcher:
            return counts[name] * hosts if name in counts and hosts else None
    return None
