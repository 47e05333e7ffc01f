"""A model hub that lives in memory: as much of the Hugging Face hub's protocol as one upload by its client takes.

Large files (`*.safetensors`, `*.gguf`) are stored by their hash before a commit names them, as git-lfs has it. It ignores who
asks, but for whether they have a token, and everything else that a hub does.
"""

from __future__ import annotations

import base64
import json
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from chaccu.testing.http_thread import HttpThread

_LARGE = (".safetensors", ".gguf")


class FakeHub(HttpThread):
    """A hub for one repository, reached at `root`. `files`: content by name, of the last commit; `commits`: their messages;
    `stored`: large files that arrived, by hash; `token`: the one that may write; `fails`: what gets status 500
    ("commit")."""

    def __init__(self, *, token: str = "hf_secret") -> None:
        self.files: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.stored: dict[str, bytes] = {}
        self.uploads = 0
        self.private: bool | None = None
        self.fails: set[str] = set()
        self._token = token
        super().__init__(
            [
                Route("/api/repos/create", self._create, methods=["POST"]),
                Route("/api/validate-yaml", self._validate, methods=["POST"]),
                Route("/api/models/{repo:path}/preupload/main", self._preupload, methods=["POST"]),
                Route("/api/models/{repo:path}/commit/main", self._commit, methods=["POST"]),
                Route("/api/models/{repo:path}", self._info),
                Route("/{repo:path}.git/info/lfs/objects/batch", self._batch, methods=["POST"]),
                Route("/lfs/{sha256}", self._store, methods=["PUT"]),
            ]
        )

    async def _create(self, request: Request) -> Response:
        if request.headers.get("authorization") != f"Bearer {self._token}":
            return JSONResponse({"error": "Invalid token"}, 401)
        asked = await request.json()
        url = f"{self.root}/{asked.get('organization') or 'me'}/{asked['name']}"
        if self.private is not None:
            return JSONResponse({"error": "You already created this model repo", "url": url}, 409)
        self.private = asked.get("visibility") == "private"
        return JSONResponse({"url": url})

    async def _info(self, request: Request) -> Response:
        if self.private is None:
            return JSONResponse({"error": "Repository not found"}, 404)
        siblings = [{"rfilename": name} for name in self.files]
        repo = request.path_params["repo"]
        return JSONResponse({"id": repo, "modelId": repo, "private": self.private, "sha": self._sha, "siblings": siblings})

    @property
    def _sha(self) -> str:
        return f"{len(self.commits):040}"

    async def _validate(self, request: Request) -> Response:
        return JSONResponse({"errors": [], "warnings": []})

    async def _preupload(self, request: Request) -> Response:
        names = [file["path"] for file in (await request.json())["files"]]
        modes = {name: "lfs" if name.endswith(_LARGE) else "regular" for name in names}
        return JSONResponse(
            {"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]}
        )

    async def _batch(self, request: Request) -> Response:
        found: list[dict[str, Any]] = []
        for one in (await request.json())["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.root}/lfs/{one['oid']}"}}}
            found.append({**one, **({} if one["oid"] in self.stored else upload)})
        return JSONResponse({"transfer": "basic", "objects": found})

    async def _store(self, request: Request) -> Response:
        self.stored[request.path_params["sha256"]] = await request.body()
        self.uploads += 1
        return Response()

    async def _commit(self, request: Request) -> Response:
        if "commit" in self.fails:
            return JSONResponse({"error": "out of order"}, 500)
        lines = [json.loads(line) for line in (await request.body()).splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") != self._sha:
            return JSONResponse({"error": "A commit has happened since"}, 412)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "deletedFile":
                del self.files[value["path"]]
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.stored[value["oid"]]
            else:
                self.files[value["path"]] = base64.b64decode(value["content"])
        self.commits.append(header["summary"])
        return JSONResponse({"commitUrl": f"{self.root}/me/tiny/commit/{self._sha}", "commitOid": self._sha})
