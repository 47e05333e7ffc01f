"""Errors travel between processes whole, and say what to do."""

from __future__ import annotations

import pickle

import pytest

from chaccu.engine import ContextOverflowError
from chaccu.errors import ChaccuError, DataError, MissingDependencyError, did_you_mean


@pytest.mark.parametrize(
    "error",
    [
        DataError("no record.", remedy="look"),
        MissingDependencyError("ray", extra="ray", needed_for="--on ray"),
        ContextOverflowError(40, 32, "the prompt has"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_comes_out_of_another_process_as_it_went_in(error: ChaccuError) -> None:
    there = pickle.loads(pickle.dumps(error))
    assert type(there) is type(error)
    assert (str(there), there.args, vars(there)) == (str(error), error.args, vars(error))


def test_the_nearest_names_are_offered_and_else_all() -> None:
    assert did_you_mean("chatlm", ["chatml", "gemma-3"]) == "did you mean 'chatml'?"
    assert did_you_mean("x", ["b", "a"]) == "one of: a, b"
