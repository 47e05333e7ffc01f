"""Models of the Hugging Face hub: what counts as a hub's name, and the local copy of what has it.

It ignores what a model is for: the rooms say which files they want, and which error it is when there are none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from chaccu.errors import ChaccuError, MissingDependencyError

# What loading a model takes; weights in PyTorch's pickles are fetched by those alone that can read them safely.
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja")
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")


def could_be_hub_id(name: str) -> bool:
    """Whether the hub may have a model of that name: `owner/name`, or the bare name of one of the oldest.

    A path whose folder is there is meant as a path.
    """
    path = Path(name)
    return _HUB_ID.fullmatch(name) is not None and (len(path.parts) == 1 or not path.parent.exists())


def fetch_model(name: str, *, error: type[ChaccuError], files: Iterable[str] = MODEL_FILES) -> Path:
    """The folder with those `files` (glob patterns) of the hub's model `name`, downloaded where it is not there yet.

    Raises `error` when the hub does not give it, `MissingDependencyError` when the hub cannot be asked.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as missing:
        raise MissingDependencyError("huggingface-hub", extra="train", needed_for=f"fetching {name}") from missing
    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (OSError, ValueError) as refusal:
        raise error(
            f"there is no folder {name}, and the model hub did not give it: {type(refusal).__name__}.",
            remedy="check the name and the network, or download the model and name its folder",
        ) from refusal


def find_model_folder(name: str | Path, *, error: type[ChaccuError], files: Iterable[str] = MODEL_FILES) -> Path:
    """The folder called `name`, or else what the hub has under that id. Raises as `fetch_model`."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not could_be_hub_id(str(name)):
        raise error(f"there is no model at {name}.", remedy="check the path: a folder with config.json and weights")
    return fetch_model(str(name), error=error, files=files)
