"""`JudgePrompt`: what a judge is asked, out of a file, and `render_prompt`, which puts a question and its answers into it.

Invariants: a prompt's hash is that of its file's bytes, and the same inputs give the same bytes. In a prompt of Chaccu's own
form every text of others stands between two lines that carry a code; the code is derived from all of the texts and occurs in
none of them, so no answer can end its own part. A prompt of MT-bench's form is rendered as such files are: the texts as they
are, with nothing around them. It ignores who is asked, and what comes back.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Formatter
from typing import Any, Literal

import msgspec

from chaccu.artifact import sha256_json, storage_errors
from chaccu.conversation import Message
from chaccu.errors import DataError, UsageError, did_you_mean
from chaccu.judge.questions import Question

Kind = Literal["pairwise", "single"]
Output = Literal["winner", "score", "score_pair", "json"]

# What a template may hold, in Chaccu's own form and in that of MT-bench's and Vicuna's files.
_OWN_FIELD = re.compile(r"question|answer(_[ab])?|conversation(_[ab])?|reference|judged|criteria")
_FOREIGN_FIELD = re.compile(r"question(_\d+)?|(ref_)?answer(_\d+)?|answer_[ab](_\d+)?")

_FOREIGN_OUTPUTS: dict[str, Output] = {"[[A]]": "winner", "[[rating]]": "score", "[[rating_a,rating_b]]": "score_pair"}
# What can be read of a judge's text about two answers, or about one.
_STATED: dict[Kind, tuple[Output, ...]] = {"pairwise": ("winner", "score_pair", "json"), "single": ("score", "json")}
_VARIANTS = ("", "-reference", "-conversation", "-reference-conversation")


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A prompt file of Chaccu's own form (TOML)."""

    name: str
    version: int
    kind: Kind
    output: Output
    system: str
    template: str
    wants_reference: bool = False
    conversation: bool = False
    criteria: str | None = None
    schema: dict[str, Any] | None = None
    scale: tuple[float, float] = (1, 10)


class JudgePrompt(_File, frozen=True, kw_only=True):
    """A judge's prompt.

    `kind`: of two answers or of one. `output`: what the judge is to state, see `judge/parsing.py`. `system`: to be sent as the
    system text. `wants_reference`: shows a reference answer. `conversation`: shows all turns up to the one that is judged,
    where others show one turn alone. `criteria`: what a rubric grades by, where a question has none of its own. `schema`: JSON
    schema of the output "json". `scale`: lowest and highest score that counts. `is_fenced`: of Chaccu's own form, with the
    texts of others between marked lines. `constants`: further values of the template. `sha256`: of the file's bytes; of a file
    with a prompt a line, of that line's.
    """

    version: int = 1
    is_fenced: bool = True
    constants: dict[str, str] = {}
    sha256: str = ""

    @property
    def response_format(self) -> dict[str, Any] | None:
        """What an OpenAI-compatible endpoint takes as `response_format`, where the prompt has a schema."""
        if self.schema is None:
            return None
        return {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": self.schema}}


class _Line(msgspec.Struct, kw_only=True):
    """A line of MT-bench's `judge_prompts.jsonl` (name, type, output_format) or of Vicuna's `prompt.jsonl` (prompt_id)."""

    system_prompt: str
    prompt_template: str
    name: str = ""
    type: Kind = "pairwise"
    output_format: str = "[[rating_a,rating_b]]"
    prompt_id: int | None = None
    defaults: dict[str, str] = {}


def list_prompts() -> list[str]:
    """Names of the shipped prompts, sorted."""
    return sorted(entry.name.removesuffix(".toml") for entry in _folder().iterdir() if entry.name.endswith(".toml"))


def load_prompt(name_or_path: str) -> JudgePrompt:
    """A shipped prompt by name, one of a TOML file, or `FILE.jsonl#NAME` out of a file with a prompt a line.

    Raises `UsageError` for a name that is nowhere, `DataError` for a file that holds no prompt, `StorageError`.
    """
    file, _, name = name_or_path.partition("#")
    if not file.endswith(".jsonl"):
        return _load_toml(name_or_path)
    prompts = {prompt.name: prompt for prompt in _read_lines(Path(file))}
    if name not in prompts:
        raise UsageError(f"{file} has no prompt named {name!r}.", remedy=did_you_mean(name, prompts))
    return prompts[name]


def load_prompts(name_or_path: str) -> list[JudgePrompt]:
    """A shipped prompt with its variants for references and conversations, or all prompts of a file; see `choose_prompt`."""
    if name_or_path.endswith(".jsonl"):
        return list(_read_lines(Path(name_or_path)))
    shipped = [name_or_path + variant for variant in _VARIANTS if name_or_path + variant in list_prompts()]
    return [load_prompt(name) for name in shipped or [name_or_path]]


def choose_prompt(
    prompts: Iterable[JudgePrompt], kind: Kind, question: Question, turn: int | None, *, has_reference: bool
) -> JudgePrompt:
    """The one among `prompts` that goes with a question.

    One with the reference answer where there is one, for a judge that is not shown the right result follows a wrong answer
    (Zheng et al. 2023); one of the whole conversation from the second turn on. Where that is not among them, one without the
    reference, or of the conversation, takes its place; never one that hides the earlier turns. Raises `UsageError` when none
    fits.
    """
    later = turn > 0 if turn is not None else len(question.turns) > 1
    fitting = [
        one
        for one in prompts
        if one.kind == kind and (one.conversation or not later) and (has_reference or not one.wants_reference)
    ]
    if not fitting:
        raise UsageError(
            f"no {kind} prompt goes with question {question.question_id} ({question.category}, "
            f"{'a later turn' if later else 'one turn'}, {'with' if has_reference else 'without'} a reference).",
            remedy="name a prompt that shows the conversation and, where there is no reference, wants none",
        )
    return min(fitting, key=lambda one: (one.wants_reference != has_reference, one.conversation != later))


def with_criteria(prompt: JudgePrompt, criteria: str) -> JudgePrompt:
    """`prompt` with these criteria for the questions that have none of their own; they count in its hash."""
    return msgspec.structs.replace(prompt, criteria=criteria, sha256=sha256_json([prompt.sha256, criteria]))


def render_prompt(
    prompt: JudgePrompt,
    question: Question,
    turn: int | None,
    answers: Sequence[Sequence[str]],
    reference: Sequence[str] | None,
) -> tuple[Message, ...]:
    """The messages that ask a judge; `prompt.system` is to be sent with them as the system text.

    `turn`: from 0, the one to be judged; None for all turns together. `answers`: of each model in the order shown, one a turn.
    `reference`: one a turn. Raises `DataError` where an answer, the reference or the criteria are missing, `UsageError` for a
    turn or a number of answers that the prompt does not take.
    """
    last = turn if turn is not None else len(question.turns) - 1
    _check(prompt, question, last, answers, reference)
    if prompt.is_fenced:
        values = _fence(_own_texts(prompt, question, last, answers, reference))
        values["judged"] = (
            "all requests together" if turn is None and last else f"request {last + 1}" if last else "the request"
        )
        values["criteria"] = (question.criteria or prompt.criteria or "").strip()
    else:
        values = _foreign_texts(prompt, question, last, answers, reference)
    return (Message("user", prompt.template.format_map(values | prompt.constants)),)


def _check(
    prompt: JudgePrompt, question: Question, last: int, answers: Sequence[Sequence[str]], reference: Sequence[str] | None
) -> None:
    wanted = 2 if prompt.kind == "pairwise" else 1
    asked = f"question {question.question_id}"
    if len(answers) != wanted:
        raise UsageError(f"{prompt.name} takes {wanted} answers, not {len(answers)}.", remedy="a prompt of the other kind")
    if not 0 <= last < len(question.turns):
        raise UsageError(f"{asked} has turns 0 to {len(question.turns) - 1}, not {last}.", remedy="one of these")
    if last and not prompt.conversation:
        raise UsageError(
            f"{prompt.name} shows one turn, and turn {last} of {asked} rests on those before.",
            remedy="a prompt of the conversation, as `choose_prompt` picks it",
        )
    if any(len(one) <= last for one in answers):
        raise DataError(f"{asked} has no answer to turn {last}.", remedy="collect the answers first")
    if prompt.wants_reference and (reference is None or len(reference) <= last):
        raise DataError(
            f"{asked} has no reference answer to turn {last}.", remedy=f"give one, or another prompt than {prompt.name}"
        )
    if "{criteria}" in prompt.template and not (question.criteria or prompt.criteria):
        raise DataError(f"{asked} has no criteria, and {prompt.name} has none.", remedy="criteria with the question, or a file")


def _own_texts(
    prompt: JudgePrompt, question: Question, last: int, answers: Sequence[Sequence[str]], reference: Sequence[str] | None
) -> dict[str, list[tuple[str, str]]]:
    """For each field of a template its parts: (name in the marked lines, text)."""
    sides = dict(zip(("_a", "_b") if prompt.kind == "pairwise" else ("",), answers, strict=True))
    parts: dict[str, list[tuple[str, str]]] = {"question": [("QUESTION", question.turns[last])]}
    numbers = range(last + 1)
    for side, texts in sides.items():
        who = f"ANSWER {side[1:].upper()}".strip()
        parts["answer" + side] = [(who, texts[last])]
        parts["conversation" + side] = [
            part
            for one in numbers
            for part in ((f"REQUEST {one + 1}", question.turns[one]), (f"{who} TO REQUEST {one + 1}", texts[one]))
        ]
    if prompt.wants_reference and reference is not None:
        several = prompt.conversation
        parts["reference"] = [
            (f"REFERENCE ANSWER TO REQUEST {one + 1}" if several else "REFERENCE ANSWER", reference[one]) for one in numbers
        ]
    return parts


def _fence(parts: Mapping[str, Sequence[tuple[str, str]]]) -> dict[str, str]:
    """The parts of each field between lines with a code that no text holds."""
    texts = [text for field in parts.values() for _, text in field]
    code, number = "", 0
    while not code or any(code in text for text in texts):
        code, number = sha256_json([number, texts])[:12], number + 1
    return {
        name: "\n\n".join(f"<<<{title} {code}>>>\n{text}\n<<<END OF {title} {code}>>>" for title, text in field)
        for name, field in parts.items()
    }


def _foreign_texts(
    prompt: JudgePrompt, question: Question, last: int, answers: Sequence[Sequence[str]], reference: Sequence[str] | None
) -> dict[str, str]:
    """The fields of MT-bench's templates, and of Vicuna's, which number the answers where the former number the turns."""

    def number(prefix: str, texts: Sequence[str]) -> dict[str, str]:
        return {f"{prefix}_{one}": text for one, text in enumerate(texts[: last + 1], start=1)}

    values = {"question": question.turns[0]} | number("question", question.turns) | number("ref_answer", reference or ())
    if prompt.kind == "single":
        values |= {"answer": answers[0][0]} | number("answer", answers[0])
    else:
        for name, place, texts in zip("ab", "12", answers, strict=True):
            values |= {f"answer_{name}": texts[0], f"answer_{place}": texts[0]} | number(f"answer_{name}", texts)
    fields = _fields(prompt.template) - prompt.constants.keys()
    missing = sorted(fields - values.keys())
    if missing or (prompt.conversation and f"question_{last + 1}" not in fields):
        raise UsageError(
            f"{prompt.name} does not go with turn {last} of question {question.question_id}: "
            + (f"nothing fills {{{missing[0]}}}." if missing else "it does not show that turn."),
            remedy="a prompt for as many turns, as `choose_prompt` picks it",
        )
    return values


def _load_toml(name_or_path: str) -> JudgePrompt:
    if name_or_path in list_prompts():
        return _parse_toml((_folder() / f"{name_or_path}.toml").read_bytes(), name_or_path)
    path = Path(name_or_path)
    if path.suffix != ".toml":
        raise UsageError(
            f"there is no judge's prompt {name_or_path!r}.",
            remedy=f"{did_you_mean(name_or_path, list_prompts())}; or a file: FILE.toml, FILE.jsonl#NAME",
        )
    with storage_errors(path):
        return _parse_toml(path.read_bytes(), name_or_path)


def _parse_toml(data: bytes, source: str) -> JudgePrompt:
    try:
        file = msgspec.convert(tomllib.loads(data.decode()), _File)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise DataError(f"{source} is no judge's prompt: {error}.", remedy="docs/judge.md shows one") from error
    if (file.output == "json") != (file.schema is not None):
        raise DataError(f"{source}: output {file.output!r} and a schema go together or not at all.", remedy='output = "json"')
    _check_stated(file.kind, file.output, source)
    stated = "winner" if file.kind == "pairwise" else "score"
    if file.schema is not None and stated not in file.schema.get("properties", {}):
        raise DataError(f"the schema of {source} has no property {stated!r}.", remedy="a verdict is read from it")
    if not file.scale[0] < file.scale[1]:
        raise DataError(f"the scale of {source} is {list(file.scale)}.", remedy="the lowest score first, as in [1, 10]")
    _check_shown(file, _check_fields(file.template, _OWN_FIELD, (), source), source)
    settings = msgspec.structs.asdict(file) | {"system": file.system.strip(), "template": file.template.strip()}
    return JudgePrompt(**settings, sha256=hashlib.sha256(data).hexdigest())


def _read_lines(path: Path) -> Iterable[JudgePrompt]:
    with storage_errors(path):
        lines = path.read_bytes().splitlines()
    for number, data in enumerate(lines, start=1):
        if not data.strip():
            continue
        source = f"line {number} of {path}"
        try:
            line = msgspec.json.decode(data, type=_Line)
        except msgspec.DecodeError as error:
            raise DataError(f"{source} is no judge's prompt: {error}.", remedy="docs/judge.md names the forms") from error
        if line.output_format not in _FOREIGN_OUTPUTS:
            raise DataError(
                f"{source}: output_format {line.output_format!r} is unknown.", remedy=f"one of {', '.join(_FOREIGN_OUTPUTS)}"
            )
        _check_stated(line.type, _FOREIGN_OUTPUTS[line.output_format], source)
        fields = _check_fields(line.prompt_template, _FOREIGN_FIELD, line.defaults, source)
        yield JudgePrompt(
            name=line.name or str(line.prompt_id or number),
            kind=line.type,
            output=_FOREIGN_OUTPUTS[line.output_format],
            system=line.system_prompt,
            template=line.prompt_template,
            wants_reference=any(field.startswith("ref_answer") for field in fields),
            conversation="question_2" in fields,
            scale=(0, 10),
            is_fenced=False,
            constants=line.defaults,
            sha256=hashlib.sha256(data).hexdigest(),
        )


def _check_fields(template: str, known: re.Pattern[str], constants: Iterable[str], source: str) -> set[str]:
    """The fields of a template. Raises `DataError` for one that nothing fills."""
    try:
        fields = _fields(template)
    except ValueError as error:
        raise DataError(f"the template of {source} cannot be read: {error}.", remedy="write {{ and }} for braces") from error
    for name in sorted(fields - set(constants)):
        if not known.fullmatch(name):
            raise DataError(f"the template of {source} has the unknown field {{{name}}}.", remedy="write {{ and }} for braces")
    return fields


def _check_stated(kind: Kind, output: Output, source: str) -> None:
    """Raises `DataError` where every verdict would be paid for and none could be read."""
    if output not in _STATED[kind]:
        raise DataError(
            f"{source}: a prompt of kind {kind!r} cannot have the output {output!r}.",
            remedy=f"one of {', '.join(_STATED[kind])}",
        )


def _check_shown(file: _File, fields: set[str], source: str) -> None:
    """Raises `DataError` for a field that a prompt of this kind does not fill, or where what is to be judged is not shown."""
    sides = ("_a", "_b") if file.kind == "pairwise" else ("",)
    filled = {"question", "judged", "criteria"} | {what + side for what in ("answer", "conversation") for side in sides}
    if file.wants_reference:
        filled.add("reference")
    for name in sorted(fields - filled):
        raise DataError(
            f"nothing fills {{{name}}} in the template of {source}.",
            remedy="answer and conversation are of a grade, those with _a and _b of a pair; reference wants wants_reference",
        )
    wanted = [[f"conversation{side}"] if file.conversation else [f"answer{side}", f"conversation{side}"] for side in sides]
    for names in [*wanted, *([["reference"]] if file.wants_reference else [])]:
        if fields.isdisjoint(names):
            raise DataError(
                f"the template of {source} does not show {{{names[0]}}}.", remedy="put it where the judge is to read it"
            )


def _fields(template: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(template) if name is not None}


def _folder() -> Traversable:
    return resources.files("chaccu.judge") / "prompt_files"
