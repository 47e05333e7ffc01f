"""Questions become answers of several models, and a judge's texts become verdicts."""

from chaccu.judge.answers import Answer, Asked, Failure, collect_answers, read_answers
from chaccu.judge.parsing import parse_scores
from chaccu.judge.questions import Question, list_question_sets, load_questions
from chaccu.judge.reviews import Review, read_reviews
from chaccu.judge.score import Grades, PairScores, ScoreReport, score_reviews

__all__ = [
    "Answer",
    "Asked",
    "Failure",
    "Grades",
    "PairScores",
    "Question",
    "Review",
    "ScoreReport",
    "collect_answers",
    "list_question_sets",
    "load_questions",
    "parse_scores",
    "read_answers",
    "read_reviews",
    "score_reviews",
]
