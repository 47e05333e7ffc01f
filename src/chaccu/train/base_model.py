"""Where a recipe's model lies: a folder, or the local copy of a model of the hub."""

from __future__ import annotations

from pathlib import Path

from chaccu.errors import TrainError
from chaccu.hub import find_model_folder


def find_base(name: str) -> Path:
    """The folder called `name`, or what the Hugging Face hub has under that id, fetched where it is not there yet.

    Raises `TrainError` when there is neither, `MissingDependencyError` when the hub cannot be asked.
    """
    return find_model_folder(name, error=TrainError)
