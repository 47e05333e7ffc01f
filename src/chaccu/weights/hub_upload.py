"""What was made ready for a model hub is sent there, as one commit.

One commit of all files (`HfApi.create_commit`), rather than the many of an upload of large folders: a repository holds the old
version or the new one, never a mixture of both. An upload that was cut off is resumed by running it again: the hub stores large
files by their hash before the commit, and asks only for those that it does not have.

Invariants: nothing of the repository changes before the commit; weights of an earlier version that are not among the files are
removed in the same commit, since a loader would take them; the token is never part of a message.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import msgspec

from chaccu.errors import MissingDependencyError, WeightsError
from chaccu.weights.publish import Publication

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# Endings of what holds a model's weights, or says which files do.
WEIGHT_ENDINGS = (".safetensors", ".bin", ".gguf", ".index.json")


class Upload(msgspec.Struct, frozen=True, kw_only=True):
    """What was done: the commit's address, and the weights of an earlier version that it removed."""

    url: str
    removed: list[str]


def upload_publication(
    publication: Publication, *, private: bool = False, message: str | None = None, api: HfApi | None = None
) -> Upload:
    """Send `publication` to its repository, which is made if it is not there.

    `api` stands in for the hub's client, whose token is HF_TOKEN's or the login's. Raises `WeightsError` when the hub refuses,
    cannot be reached, or has that repository in public while `private` is asked for; the repository's files are as they were
    then.
    """
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as missing:
        raise MissingDependencyError("huggingface-hub", extra="train", needed_for="publishing") from missing
    client = HfApi() if api is None else api
    # What the hub's errors derive from is its HTTP library's base of all that goes wrong on the way, whichever library it has.
    on_the_way = [base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError" and issubclass(base, Exception)]
    failures: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError, *on_the_way)
    try:
        return _commit(client, publication, private, message or f"Publish {publication.folder.name} with Chaccu")
    except failures as refusal:
        raise _explain(refusal, publication.repo) from refusal


def _commit(client: HfApi, publication: Publication, private: bool, message: str) -> Upload:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    repo = publication.repo
    client.create_repo(repo, private=private or None, exist_ok=True)
    there = client.model_info(repo)
    if private and not there.private:
        raise WeightsError(
            f"{repo} is there already, and in public.", remedy="make it private on the hub first, or name another --repo"
        )
    names = [sibling.rfilename for sibling in there.siblings or []]
    removed = [name for name in names if name.endswith(WEIGHT_ENDINGS) and name not in publication.sizes]
    operations: list[Any] = [CommitOperationDelete(path_in_repo=name) for name in removed]
    for name in publication.sizes:
        content: bytes | str = str(publication.folder / name)
        if name in publication.texts:
            content = publication.texts[name].encode()
        operations.append(CommitOperationAdd(path_in_repo=str(PurePosixPath(name)), path_or_fileobj=content))
    # The commit is refused where somebody else's came between.
    commit = client.create_commit(repo, operations, commit_message=message, parent_commit=there.sha)
    return Upload(url=commit.commit_url, removed=removed)


def _explain(refusal: Exception, repo: str) -> WeightsError:
    from huggingface_hub import get_token

    status = getattr(getattr(refusal, "response", None), "status_code", None)
    said = " ".join(str(refusal).split())[:300]
    if token := get_token():
        said = said.replace(token, "…")
    if status in (401, 403) or type(refusal).__name__ == "LocalTokenNotFoundError":
        remedy = f"set HF_TOKEN to a token that may write to {repo}, or log in with hf auth login"
    elif isinstance(refusal, ValueError):
        remedy = "mend what the hub names, then run the same command again"
    else:
        remedy = "run the same command again: what the hub has already is not sent twice"
    return WeightsError(f"{repo} was not published: {type(refusal).__name__}: {said}", remedy=remedy)
