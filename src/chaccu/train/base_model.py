"""Where a recipe's model lies: a folder, or the local copy of a model of the hub."""

from __future__ import annotations

import re
from pathlib import Path

from chaccu.errors import MissingDependencyError, TrainError

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FILES = ("*.json", "*.safetensors", "*.jinja")


def find_base(name: str) -> Path:
    """The folder called `name`, or what the Hugging Face hub has under that id, fetched where it is not there yet.

    Raises `TrainError` when there is neither, `MissingDependencyError` when the hub cannot be asked.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not _HUB_ID.fullmatch(name) or name.startswith(".") or (folder.parent.is_dir() and str(folder.parent) != "."):
        raise TrainError(f"there is no model at {name}.", remedy="check the path: a folder with config.json and tokenizer.json")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingDependencyError("huggingface-hub", extra="train", needed_for=f"fetching {name}") from error
    try:
        return Path(snapshot_download(name, allow_patterns=list(_FILES)))
    except (OSError, ValueError) as error:
        raise TrainError(
            f"there is no folder {name}, and the model hub did not give it: {type(error).__name__}.",
            remedy="check the name and the network, or download the model and name its folder",
        ) from error
