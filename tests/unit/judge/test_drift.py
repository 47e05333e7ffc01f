from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from asking_fixtures import QUESTIONS, answer, session

from chaccu.client import ChatClient
from chaccu.errors import DataError
from chaccu.judge.drift import CANARIES, CHANCE, Drift, agreement_limit, measure_drift, read_canaries, write_canaries
from chaccu.judge.judging import Judging
from chaccu.judge.prompts import load_prompts
from chaccu.judge.tasks import AnswersOnFile, plan_grades
from chaccu.judge.verdict_files import VerdictCache
from chaccu.testing.scripted_judge import Reply, Script, ScriptedJudge

MODELS = [f"m{number}" for number in range(30)]


def number_of(body: dict[str, Any]) -> int:
    """The number of the model whose answer is judged."""
    text = body["messages"][-1]["content"]
    return int(text.split("I am m")[1].split(".")[0])


def steady(body: dict[str, Any], times: int) -> Reply:
    return Reply(text=f"[[{number_of(body) % 10 + 1}]]", model="gpt-1")


async def judge(folder: Path, script: Script = steady) -> None:
    on_file = AnswersOnFile(answer(model, QUESTIONS[0], 0, f"I am {model}.") for model in MODELS)
    tasks = plan_grades(QUESTIONS[:1], on_file, MODELS, load_prompts("single"))
    with ScriptedJudge(script) as server:
        async with ChatClient(server.url) as client:
            judging = Judging(tasks, [session(client)], folder, VerdictCache(folder / "cache"))
            await judging.run(at_once=8)
            write_canaries(folder, judging.settled())


async def measure(folder: Path, script: Script, repeats: int = 3) -> Drift:
    with ScriptedJudge(script) as server:
        async with ChatClient(server.url, timeout_s=5) as client:
            (drift,) = await measure_drift(read_canaries(folder), {"gpt": session(client)}, repeats=repeats, at_once=8)
            return drift


def changed(least: int, by: int = 1) -> Script:
    """A judge that grades the canaries of the models from number `least` otherwise."""

    def script(body: dict[str, Any], times: int) -> Reply:
        number = number_of(body)
        return Reply(text=f"[[{(number + by) % 10 + 1 if number >= least else number % 10 + 1}]]", model="gpt-1")

    return script


async def test_the_same_judge_raises_no_alarm(tmp_path: Path) -> None:
    await judge(tmp_path)
    canaries = read_canaries(tmp_path)
    assert len(canaries) == CANARIES
    assert [one.key for one in canaries] == sorted(one.key for one in canaries)
    drift = await measure(tmp_path, steady)
    assert (drift.tasks, drift.failed, drift.agreement, drift.repeat_agreement, drift.mean_change) == (20, 0, 1.0, 1.0, 0.0)
    assert (drift.reasons, drift.version_then, drift.version_now) == ((), "gpt-1", "gpt-1")


async def test_a_judge_that_grades_otherwise_is_an_alarm(tmp_path: Path) -> None:
    await judge(tmp_path)
    drift = await measure(tmp_path, changed(0))
    assert (drift.agreement, drift.repeat_agreement) == (0.0, 1.0)
    assert "0 of 60 new verdicts agree with those on file" in drift.reasons[0]


async def test_noise_of_its_own_is_no_alarm(tmp_path: Path) -> None:
    def noisy(body: dict[str, Any], times: int) -> Reply:
        # A third of the judgements falls otherwise, now as then, whatever was said before.
        return Reply(text=f"[[{1 if (number_of(body) + 2 * times) % 3 else 2}]]", model="gpt-1")

    await judge(tmp_path, noisy)
    drift = await measure(tmp_path, noisy)
    assert drift.agreement is not None
    assert drift.agreement < 0.9
    assert drift.reasons == ()


async def test_another_model_or_no_verdicts_are_alarms(tmp_path: Path) -> None:
    await judge(tmp_path)
    drift = await measure(tmp_path, lambda body, times: Reply(text=steady(body, times).text, model="gpt-2"))
    assert drift.reasons == ("the server answers as gpt-2, and answered as gpt-1",)
    replies = [None, "gpt-2"]
    drift = await measure(tmp_path, lambda body, times: Reply(text=steady(body, times).text, model=replies[times % 2]))
    assert drift.reasons == ("the server answers as gpt-2, and answered as gpt-1",)
    drift = await measure(tmp_path, lambda body, times: Reply(status=400))
    assert (drift.tasks, drift.failed, drift.agreement) == (0, 20, None)
    assert drift.reasons == ("no task has all its verdicts",)


def test_the_limit_is_what_chance_gives() -> None:
    # Three draws that differ from the first: by chance the odd one stands first in a quarter of tasks.
    odd = ("A", "B", "B", "B")
    assert agreement_limit([odd], 0.3) == 2
    assert agreement_limit([odd], 0.2) == 0
    assert agreement_limit([odd] * 3, 1 / 64) == 2
    assert agreement_limit([("A",) * 4] * 5, 0.02) == 15


def test_a_folder_without_canaries_says_so(tmp_path: Path) -> None:
    (tmp_path / "canaries.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match="has no parsed verdict"):
        read_canaries(tmp_path)
    (tmp_path / "canaries.jsonl").write_bytes(b"{}\n")
    with pytest.raises(DataError, match=r"line 1 of .* is no canary"):
        read_canaries(tmp_path)


@pytest.mark.parametrize(("answered", "reasons"), [(3, ()), (2, ("2 tasks with 3 new verdicts each are too few to tell",))])
async def test_tasks_that_are_too_few_to_tell_are_an_alarm(tmp_path: Path, answered: int, reasons: tuple[str, ...]) -> None:
    await judge(tmp_path)
    numbers = sorted(int(canary.task.models[0][1:]) for canary in read_canaries(tmp_path))[:answered]
    drift = await measure(
        tmp_path, lambda body, times: steady(body, times) if number_of(body) in numbers else Reply(status=400)
    )
    assert (drift.tasks, drift.failed, drift.reasons) == (answered, CANARIES - answered, reasons)


@pytest.mark.parametrize(("repeats", "least"), [(2, 4), (3, 3)])
def test_the_least_number_of_tasks_that_can_tell(repeats: int, least: int) -> None:
    # Where every new verdict differs from the one on file, fewer tasks have no limit above nothing.
    changed = ("A", *("B" * repeats))
    assert agreement_limit([changed] * least, CHANCE) > 0
    assert agreement_limit([changed] * (least - 1), CHANCE) == 0
    assert (repeats + 1) ** least * CHANCE >= 1 > (repeats + 1) ** (least - 1) * CHANCE
