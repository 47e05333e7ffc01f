from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from asking_fixtures import QUESTIONS, answer, answers_of, comparisons, grades, session, settings

from chaccu.artifact import read_manifest, verify_files
from chaccu.client import ChatClient
from chaccu.errors import DataError, StorageError
from chaccu.judge.asking import NOT_ASKED_AGAIN, JudgeChangedError
from chaccu.judge.budget import Budget, Price
from chaccu.judge.judging import Judged, Judging
from chaccu.judge.judging_manifest import read_judge_versions, write_judging_manifest
from chaccu.judge.prompts import load_prompts
from chaccu.judge.retry import RetryPolicy
from chaccu.judge.tasks import AnswersOnFile, JudgeTask, plan_comparisons
from chaccu.judge.verdict_files import VerdictCache
from chaccu.judge.verdicts import compare_orders, read_verdicts
from chaccu.testing.scripted_judge import Reply, ScriptedJudge

GOOD = Reply(text="[[A]]", model="gpt-0613")


async def run(
    server: ScriptedJudge,
    folder: Path,
    tasks: list[JudgeTask],
    *names: str,
    cache: Path | None = None,
    at_once: int = 3,
    **others: Any,
) -> Judged:
    async with ChatClient(server.url, timeout_s=5) as client:
        sessions = [session(client, name, **others) for name in names or ("gpt",)]
        judging = Judging(tasks, sessions, folder, VerdictCache(cache or folder / "cache"))
        return await judging.run(at_once=at_once)


async def test_every_task_of_every_judge_has_its_verdict_in_order(tmp_path: Path) -> None:
    tasks = comparisons("a", "b")
    seen: list[tuple[int, int]] = []
    with ScriptedJudge(lambda body, number: GOOD) as server:
        async with ChatClient(server.url) as client:
            sessions = [session(client, name) for name in ("gpt", "llama")]
            judging = Judging(tasks, sessions, tmp_path, VerdictCache(tmp_path / "cache"))
            judged = await judging.run(at_once=3, on_done=lambda done, asked: seen.append((done, asked)))
    assert (judged.asked, judged.parsed, judged.unparsed, judged.failed, judged.over_budget, judged.reused) == (
        16,
        16,
        0,
        0,
        0,
        0,
    )
    assert [(one.question_id, one.turn, one.models, one.judge) for one in judged.verdicts] == [
        (task.question.question_id, task.turn, task.models, name) for task in tasks for name in ("gpt", "llama")
    ]
    assert read_verdicts(tmp_path / "verdicts.jsonl") == judged.verdicts
    assert (tmp_path / "failures.jsonl").read_bytes() == b""
    assert (seen[0], seen[-1]) == ((0, 16), (16, 16))
    assert all(one.is_flip and one.winner == "tie" for one in compare_orders(judged.verdicts))


async def test_what_is_on_file_is_not_asked_again_and_a_cut_line_is(tmp_path: Path) -> None:
    tasks = grades("a", "b")
    with ScriptedJudge(lambda body, number: Reply(text="[[7]]")) as server:
        first = await run(server, tmp_path, tasks)
        assert (await run(server, tmp_path, tasks)).reused == 8
        assert max(server.counts.values()) == 1
        file = tmp_path / "verdicts.jsonl"
        file.write_bytes(file.read_bytes()[:-20])
        again = await run(server, tmp_path, tasks, cache=tmp_path / "other")
        assert (again.reused, again.verdicts) == (7, first.verdicts)
        assert len(server.bodies) == 9


async def test_runs_share_a_cache(tmp_path: Path) -> None:
    with ScriptedJudge(lambda body, number: Reply(text="[[7]]")) as server:
        first = await run(server, tmp_path / "one", grades("a", "b"), cache=tmp_path / "cache")
        second = await run(server, tmp_path / "two", grades("b", "c"), cache=tmp_path / "cache")
        assert (first.reused, second.reused, len(server.bodies)) == (0, 4, 12)
        assert [one.models for one in second.verdicts] == [("b",), ("c",)] * 4


async def test_what_a_run_is_not_about_leaves_the_file_and_stays_known(tmp_path: Path) -> None:
    with ScriptedJudge(lambda body, number: Reply(text="[[7]]")) as server:
        await run(server, tmp_path, grades("a", "b"))
        assert len((await run(server, tmp_path, grades("b"))).verdicts) == 4
        assert len(read_verdicts(tmp_path / "verdicts.jsonl")) == 4
        assert (await run(server, tmp_path, grades("a", "b"))).reused == 8
        assert len(server.bodies) == 8


async def test_equal_answers_are_asked_once_and_copied(tmp_path: Path) -> None:
    question = QUESTIONS[0]
    on_file = AnswersOnFile(answer(model, question, 0, "The same.") for model in "abc")
    tasks = plan_comparisons([question], on_file, on_file.models, load_prompts("pair"))
    with ScriptedJudge(lambda body, number: GOOD) as server:
        judged = await run(server, tmp_path, tasks)
        assert (judged.asked, judged.parsed, judged.reused, len(server.bodies)) == (6, 6, 5, 1)
        assert [one.models for one in judged.verdicts] == [one.models for one in tasks]
        assert sorted(one.attempts for one in judged.verdicts) == [0, 0, 0, 0, 0, 1]
        assert sum(one.prompt_tokens or 0 for one in judged.verdicts) == 100
        again = await run(server, tmp_path, tasks)
        assert (again.verdicts, len(server.bodies)) == (judged.verdicts, 1)


async def test_failures_and_gaps_are_counted_and_asked_again(tmp_path: Path) -> None:
    on_file = AnswersOnFile([one for one in answers_of("a", "b") if (one.model, one.turn) != ("b", 1)])
    tasks = plan_comparisons(QUESTIONS, on_file, on_file.models, load_prompts("pair"))
    with ScriptedJudge(lambda body, number: GOOD) as server:
        server.script = lambda body, number: Reply(status=400) if len(server.bodies) == 1 else Reply(text="Hm.")
        judged = await run(server, tmp_path, tasks, at_once=1)
        assert (judged.asked, judged.parsed, judged.unparsed, judged.failed) == (8, 0, 5, 3)
        assert [one.cause for one in judged.failures] == ["request refused", "no answer", "no answer"]
        assert judged.failures[1].message == "no answer on file of b"
        assert len((tmp_path / "failures.jsonl").read_text().splitlines()) == 3
        server.script = lambda body, number: GOOD
        again = await run(server, tmp_path, tasks)
        assert (again.parsed, again.unparsed, again.failed, again.reused) == (1, 5, 2, 5)


async def test_the_cap_stops_cleanly_and_a_higher_one_goes_on(tmp_path: Path) -> None:
    price = Price(10_000.0, 0.0)
    with ScriptedJudge(lambda body, number: Reply(text="[[7]]")) as server:
        budget = Budget(3.0)
        judged = await run(server, tmp_path, grades("a", "b"), price=price, budget=budget, count_tokens=lambda texts: 100)
        assert (judged.parsed, judged.failed, judged.over_budget, budget.spent_usd) == (3, 0, 5, 3.0)
        budget = Budget(30.0)
        again = await run(server, tmp_path, grades("a", "b"), price=price, budget=budget, count_tokens=lambda texts: 100)
        assert (again.parsed, again.reused, budget.spent_usd, len(server.bodies)) == (8, 3, 5.0, 8)


async def test_an_estimate_is_of_what_is_not_on_file(tmp_path: Path) -> None:
    with ScriptedJudge(lambda body, number: Reply(text="[[7]]")) as server:
        await run(server, tmp_path, grades("a"))
        async with ChatClient(server.url) as client:
            judge = session(client, price=Price(1.0, 10.0), count_tokens=lambda texts: 1000)
            (estimate,) = Judging(grades("a", "b"), [judge], tmp_path, VerdictCache(tmp_path / "cache")).estimate()
    assert (estimate.requests, estimate.prompt_tokens, estimate.answer_tokens) == (4, 4000, 200)
    assert estimate.cost_usd == pytest.approx(0.006)


async def test_a_judge_that_changes_ends_the_run_and_keeps_what_it_has(tmp_path: Path) -> None:
    tasks = grades("a", "b")
    with ScriptedJudge(lambda body, number: Reply(text="[[7]]", model="old")) as server:
        server.script = lambda body, number: Reply(text="[[7]]", model="old" if len(server.bodies) < 4 else "new")
        with pytest.raises(JudgeChangedError, match="gpt was old before, and the server says new"):
            await run(server, tmp_path, tasks, at_once=1)
        assert {one.judge_version for one in read_verdicts(tmp_path / "verdicts.jsonl")} == {"old"}
        with pytest.raises(JudgeChangedError, match="gpt was old before"):
            await run(server, tmp_path, tasks)
        with pytest.raises(JudgeChangedError, match="gpt was new before, and a verdict on file or in the cache says old"):
            await run(server, tmp_path / "b", tasks, cache=tmp_path / "cache", version="new")


async def test_the_manifest_counts_and_names_the_judges(tmp_path: Path) -> None:
    out = tmp_path / "v"
    with ScriptedJudge(lambda body, number: GOOD) as server:
        async with ChatClient(server.url) as client:
            judge = session(client, price=Price(10.0, 10.0), settings=settings(retry=RetryPolicy(tries=1)))
            judging = Judging(comparisons("a", "b"), [judge], out, VerdictCache(out / "cache"))
            judged = await judging.run()
            write_judging_manifest(out, judged, [judge], inputs={"questions": "0"}, settings={"x": 1}, spent_usd=0.5)
    manifest = read_manifest(out, kind="verdicts")
    verify_files(out, manifest.files)
    assert set(manifest.settings["prompts"]) == {"pair", "pair-conversation", "pair-reference"}
    assert {name: manifest.facts[name] for name in ("asked", "parsed", "unparsed", "failed", "over_budget")} == {
        "asked": 8,
        "parsed": 8,
        "unparsed": 0,
        "failed": 0,
        "over_budget": 0,
    }
    counts = manifest.facts["judges"]["gpt"]
    assert (counts["version"], counts["prompt_tokens"], counts["answer_tokens"]) == ("gpt-0613", 800, 80)
    assert (counts["cost_usd"], manifest.facts["spent_usd"]) == (0.0088, 0.5)
    assert read_judge_versions(out) == {"gpt": "gpt-0613"}
    assert read_judge_versions(tmp_path) == {}


async def test_a_full_disk_ends_the_run_and_the_next_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    def fill_up(descriptor: int) -> None:
        if (tmp_path / "verdicts.jsonl").stat().st_size > 2000:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    (tmp_path / "verdicts.jsonl").touch()
    monkeypatch.setattr(os, "fsync", fill_up)
    with ScriptedJudge(lambda body, number: GOOD) as server:
        with pytest.raises(StorageError, match=r"no space left while writing .*verdicts\.jsonl"):
            await run(server, tmp_path, comparisons("a", "b"))
        monkeypatch.undo()
        judged = await run(server, tmp_path, comparisons("a", "b"))
        assert judged.parsed == 8
        assert judged.reused > 1


async def test_a_damaged_cache_is_named(tmp_path: Path) -> None:
    with ScriptedJudge(lambda body, number: GOOD) as server:
        judged = await run(server, tmp_path, comparisons("a", "b"))
        (tmp_path / "verdicts.jsonl").unlink()
        key = judged.verdicts[0].key
        (tmp_path / "cache" / key[:2] / f"{key}.json").write_bytes(msgspec.json.encode({"a": 1}))
        with pytest.raises(DataError, match=rf"{key}\.json is no verdict"):
            await run(server, tmp_path, comparisons("a", "b"))


async def test_looking_at_what_is_left_writes_nothing(tmp_path: Path) -> None:
    with ScriptedJudge(lambda body, number: GOOD) as server:
        await run(server, tmp_path / "one", comparisons("a", "b"))
        (tmp_path / "two").mkdir()
        (tmp_path / "two" / "verdicts.jsonl").write_bytes((tmp_path / "one" / "verdicts.jsonl").read_bytes())
        async with ChatClient(server.url) as client:
            cache = VerdictCache(tmp_path / "two" / "cache")
            assert Judging(comparisons("a", "b"), [session(client)], tmp_path / "two", cache).estimate() == []
    assert [file.name for file in (tmp_path / "two").iterdir()] == ["verdicts.jsonl"]


async def test_a_judge_is_held_to_all_verdicts_of_the_folder(tmp_path: Path) -> None:
    with ScriptedJudge(lambda body, number: GOOD) as server:
        await run(server, tmp_path, comparisons("a", "b"))
        server.script = lambda body, number: Reply(text="[[A]]", model="gpt-1106")
        with pytest.raises(JudgeChangedError, match="gpt was gpt-0613 before, and the server says gpt-1106"):
            await run(server, tmp_path, comparisons("b", "c"))


async def test_an_asking_that_was_cut_short_is_taken_up_by_the_next_run(tmp_path: Path) -> None:
    price = Price(10_000.0, 0.0)
    with ScriptedJudge(lambda body, number: Reply(text="Hm." if number == 1 else "[[7]]")) as server:
        more = {"price": price, "count_tokens": lambda texts: 100}
        judged = await run(server, tmp_path, grades("a")[:1], budget=Budget(1.0), **more)
        assert (judged.parsed, judged.unparsed, judged.verdicts[0].flags) == (0, 1, (NOT_ASKED_AGAIN,))
        again = await run(server, tmp_path, grades("a")[:1], budget=Budget(2.0), **more)
        assert (again.parsed, again.unparsed, again.reused, len(server.bodies)) == (1, 0, 0, 2)
