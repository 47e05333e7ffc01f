"""`hf:OWNER/NAME[:FILE]`: the files of a data set on the Hugging Face hub, fetched into its local cache.

Which files: those that FILE, a path or a pattern, matches; without it the set's parquet files, or when it has none its JSON
files. The library is loaded only here, and downloads what the cache lacks.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chaccu.errors import DataError, MissingDependencyError, UsageError

_PARQUET = ("*.parquet",)
_JSON = tuple(f"*.{kind}{packed}" for kind in ("json", "jsonl", "ndjson") for packed in ("", ".gz", ".zst"))
# Descriptions of a set, which lie beside its data.
_NO_DATA = ("dataset_info.json", "dataset_infos.json", "*config.json", ".*")


def download_files(address: str, argument: str) -> list[tuple[str, Path]]:
    """Name and local path of each file of the set at `address` (`OWNER/NAME` or `OWNER/NAME:FILE`), sorted by name.

    Raises `UsageError` for an address of another form, `MissingDependencyError` without the library, `DataError` when the set
    or the file is not there or cannot be fetched.
    """
    repository, _, wanted = address.partition(":")
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise UsageError(f"{argument} names no data set.", remedy="the form is hf:OWNER/NAME or hf:OWNER/NAME:FILE")
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingDependencyError("huggingface_hub", extra="train", needed_for=argument) from error
    with _explained(argument):
        names = huggingface_hub.list_repo_files(repository, repo_type="dataset")
    chosen = _choose_files(names, wanted)
    if not chosen:
        what = f"no file {wanted}" if wanted else "no parquet and no JSON file"
        raise DataError(f"{argument}: the set has {what}; it has {', '.join(sorted(names)[:8]) or 'no file'}.")
    with _explained(argument):
        paths = [Path(huggingface_hub.hf_hub_download(repository, name, repo_type="dataset")) for name in chosen]
    return [(f"{argument.partition(':')[0]}:{repository}:{name}", path) for name, path in zip(chosen, paths, strict=True)]


@contextmanager
def _explained(argument: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # The library and the HTTP client below it have no common base of errors: network, rights, a name it does not like.
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{argument} cannot be fetched: {why}",
            remedy="check the name, the network, and HF_TOKEN where a login is needed; or download it and name the files",
        ) from error


def _choose_files(names: list[str], wanted: str) -> list[str]:
    if wanted:
        return sorted(name for name in names if fnmatch.fnmatchcase(name, wanted))
    data = [name for name in names if not any(fnmatch.fnmatchcase(name.rpartition("/")[2], pattern) for pattern in _NO_DATA)]
    for patterns in (_PARQUET, _JSON):
        found = sorted(name for name in data if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))
        if found:
            return found
    return []
