"""A process's place, its share of the rows, and what is said when places and recipe, or recipe and machine, do not agree."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import Any

import msgspec
import pytest

from chaccu.errors import ArtifactError, RecipeError
from chaccu.train.pack import PackedRow
from chaccu.train.recipe import Recipe, parse_recipe

torch = pytest.importorskip("torch", reason="torch is not installed")

from chaccu.train.launch import Failure, explain_failures, telling_launcher  # noqa: E402 (torch may be absent)
from chaccu.train.processes import Processes, check_processes, find_place, launched, speaks  # noqa: E402

ROWS = [PackedRow([n, n + 1], [0, 1], [2]) for n in range(7)]
PLACE = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


def parse(**fields: Any) -> Recipe:
    return parse_recipe({"model": "base", "output": "out", "data": [{"path": "x"}], "sequence_len": 64, **fields})


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_every_row_counts_once_and_all_shares_are_equally_long(count: int) -> None:
    shares = [Processes(rank=rank, count=count).share(ROWS) for rank in range(count)]
    assert len({len(share) for share in shares}) == 1
    counted = [row.ids_T[0] for share in shares for row in share if row.counts]
    assert sorted(counted) == list(range(7))
    # What only makes up a share is a row like others: it goes through the model as they do.
    assert all(row.trained_tokens for share in shares for row in share)


def test_no_rows_make_no_shares() -> None:
    assert Processes(rank=1, count=2).share([]) == []


def test_a_place_is_what_the_launcher_says() -> None:
    place = find_place(parse(processes=4), PLACE)
    assert place == Processes(rank=3, count=4, local_rank=1, local_count=2)
    assert not place.first
    assert (launched(PLACE), speaks(PLACE), speaks({**PLACE, "RANK": "0"}), speaks({})) == (True, False, True, True)


def test_other_processes_than_the_recipe_names_are_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"launcher started 4 processes \(WORLD_SIZE\), and the recipe's processes is 2"
    ) as caught:
        find_place(parse(processes=2), PLACE)
    assert "processes=4" in caught.value.remedy
    with pytest.raises(RecipeError, match="processes is 2, and this process was started alone"):
        find_place(parse(processes=2), {})
    assert find_place(parse(), {"WORLD_SIZE": "8"}) == Processes()


def test_more_processes_than_gpus_are_refused_with_the_same_step_on_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RecipeError, match="processes is 8, one a GPU, and this machine has 1 GPU") as caught:
        check_processes(parse(processes=8, gradient_accumulation_steps=2))
    assert "processes=1 gradient_accumulation_steps=16" in caught.value.remedy
    with pytest.raises(RecipeError) as caught:
        check_processes(parse(processes=8, global_batch_size=64))
    assert "global_batch_size stays, gradient_accumulation_steps becomes 64" in caught.value.remedy
    assert "vicuna-13b-1gpu" in caught.value.remedy
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 6)
    with pytest.raises(RecipeError) as caught:
        check_processes(parse(processes=8))
    assert "processes=4 gradient_accumulation_steps=2" in caught.value.remedy
    check_processes(parse(processes=6))


def test_without_gpus_processes_share_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_processes(parse(processes=8))


def test_the_cause_is_named_not_those_that_found_the_others_gone() -> None:
    own = Failure(rank=2, message="the disk is full.", remedy="make room", known=True, time_s=9.0)
    killed = Failure(rank=1, signal=signal.SIGKILL, time_s=8.0)
    gone = Failure(rank=0, message="Traceback…\nRuntimeError: Connection closed by peer", time_s=7.0)
    ended = Failure(rank=3, signal=signal.SIGTERM, time_s=1.0)
    error = explain_failures([ended, gone, killed, own], 4)
    assert (error.message, error.remedy) == ("process 2 of 4: the disk is full.", "make room")
    assert "process 1 of 4 was ended by SIGKILL" in str(explain_failures([ended, gone, killed], 4))
    assert "process 0 of 4: Traceback" in str(explain_failures([ended, gone], 4))
    assert "process 3 of 4 was ended by SIGTERM" in str(explain_failures([ended], 4))


def test_an_error_leaves_word_for_the_launcher(tmp_path: Any) -> None:
    file = tmp_path / "error.json"
    with pytest.raises(ArtifactError), telling_launcher({"TORCHELASTIC_ERROR_FILE": str(file)}):
        raise ArtifactError("it is damaged.", remedy="fetch it again")
    word = msgspec.json.decode(file.read_bytes())
    assert word["message"]["message"] == "it is damaged.\n  try: fetch it again"
    assert word["chaccu"]["known"]


def test_a_process_that_ends_has_written_all_and_runs_nothing_more() -> None:
    program = (
        "import atexit, sys\n"
        "from chaccu.train.processes import end_process\n"
        "atexit.register(print, 'too late')\n"
        "sys.stdout.write('written')\n"
        "end_process()\n"
        "print('not reached')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "written")
