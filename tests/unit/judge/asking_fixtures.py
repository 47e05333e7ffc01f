"""Answers, tasks and sessions for the tests of judging."""

from __future__ import annotations

from chaccu.client import ChatClient, Sampling
from chaccu.judge import Answer, Question
from chaccu.judge.asking import AskSettings, JudgeSession
from chaccu.judge.judges import Judge
from chaccu.judge.prompts import load_prompts
from chaccu.judge.retry import Clock
from chaccu.judge.tasks import AnswersOnFile, JudgeTask, plan_comparisons, plan_grades
from chaccu.testing.answers import build_answer

QUESTIONS = [
    Question(1, "knowledge", ("What is a vicuña?",)),
    Question(2, "writing", ("Write a line.", "Now shorter.")),
    Question(3, "math", ("1 + 1?",), reference=("2",)),
]


def answer(model: str, question: Question, turn: int, text: str | None = None) -> Answer:
    """One answer as it is on file."""
    said = f"{model} says {turn} to {question.question_id}" if text is None else text
    return build_answer(question.question_id, model, said, turn=turn, category=question.category, tokens=3)


def answers_of(*models: str) -> list[Answer]:
    """Each model's answers to `QUESTIONS`."""
    return [answer(model, one, turn) for model in models for one in QUESTIONS for turn in range(len(one.turns))]


def comparisons(*models: str, prompt: str = "pair") -> list[JudgeTask]:
    """All pairs in both orders."""
    return plan_comparisons(QUESTIONS, AnswersOnFile(answers_of(*models)), models, load_prompts(prompt))


def grades(*models: str, prompt: str = "single") -> list[JudgeTask]:
    """Every answer by itself."""
    return plan_grades(QUESTIONS, AnswersOnFile(answers_of(*models)), models, load_prompts(prompt))


class FastClock(Clock):
    """Time that passes only by sleeping, and one chance."""

    def __init__(self, chance: float = 1.0) -> None:
        self.chance = chance
        self.time_s = 0.0
        self.slept: list[float] = []

    def now_s(self) -> float:
        return self.time_s

    async def sleep(self, wait_s: float) -> None:
        self.slept.append(wait_s)
        self.time_s += wait_s

    def draw(self) -> float:
        return self.chance


def settings(**others: object) -> AskSettings:
    """Greedy, 50 tokens."""
    return AskSettings(sampling=Sampling(max_tokens=50, temperature=0.0), **others)  # type: ignore[arg-type]


def session(client: ChatClient, name: str = "gpt", **others: object) -> JudgeSession:
    """A judge at the client's server."""
    others = {"settings": settings(), "clock": FastClock(), **others}
    price = others.pop("price", None)
    judge = Judge(name, client.base_url, price=price)  # type: ignore[arg-type]
    return JudgeSession(judge, client, others.pop("settings"), **others)  # type: ignore[arg-type]
