"""A Hugging Face hub of one's own on a port of this machine: what its real client needs to upload and to download.

Repositories are dictionaries of files per commit. It can be told to fail: after how many requests of a kind it breaks
the connection, whom it does not know, what is gated.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_aSecretThatMustNeverBeSeen"
_REPO = r"(?P<repo>[\w.\-]+/[\w.\-]+)"


@dataclass
class Repository:
    """A repository: its commits, oldest first, each with all files."""

    private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    gated: bool = False

    @property
    def files(self) -> dict[str, bytes]:
        """The newest files."""
        return self.commits[-1][1]

    def commit(self, files: dict[str, bytes]) -> str:
        """Adds a commit; returns its id."""
        text = "\n".join(f"{name} {hashlib.sha1(files[name]).hexdigest()}" for name in sorted(files))
        name = hashlib.sha1(f"{len(self.commits)}\n{text}".encode()).hexdigest()
        self.commits.append((name, files))
        return name

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit that a revision names."""
        if revision == "main":
            return self.commits[-1]
        return next((one for one in self.commits if one[0] == revision), None)


@dataclass
class FakeHub:
    """The hub's state, and what it was asked.

    Attributes:
        repositories: by name.
        blobs: large files, by hash.
        requests: method and path of each request, in order.
        uploaded: bytes of each large file that was received.
        breaks: how many more requests whose path matches the pattern are answered before the connection is cut.
        may_write: whether the token may.
        ignores: how the names of files end that the repository's .gitignore leaves out.
        on_upload: called for each large file that was received.
    """

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    uploaded: list[int] = field(default_factory=list)
    breaks: dict[str, int] = field(default_factory=dict)
    may_write: bool = True
    ignores: tuple[str, ...] = ()
    on_upload: Callable[[], None] = lambda: None

    def add(self, name: str, files: dict[str, bytes], *, private: bool = False, gated: bool = False) -> Repository:
        """A repository that is there."""
        made = self.repositories[name] = Repository(private, gated=gated)
        made.commit(files)
        return made

    def add_folder(self, name: str, folder: Path, inside: str) -> Repository:
        """A repository with the files of a folder in one of its own."""
        files = {f"{inside}/{path.relative_to(folder).as_posix()}": path.read_bytes()
                 for path in sorted(folder.rglob("*")) if path.is_file()}  # fmt: skip
        return self.add(name, files)


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    # Answers ---------------------------------------------------------------------------------------------------------

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        length = int(self.headers.get("Content-Length") or 0)
        for pattern, left in list(self.hub.breaks.items()):
            if re.search(pattern, f"{self.command} {path}"):
                if left == 0:
                    self.rfile.read(length // 2)  # in the middle of it
                    self.close_connection = True
                    self.connection.close()
                    return
                self.hub.breaks[pattern] = left - 1
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(self._chunks())
        else:
            body = self.rfile.read(length)
        for pattern, handle in _ROUTES:
            found = re.fullmatch(pattern, f"{self.command} {path}")
            if found:
                handle(self, found.groupdict(), body)
                return
        self._json(404, {"error": "no such route"})

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _send(self, code: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, code: int, value: Any, **headers: str) -> None:
        named = {key.replace("_", "-"): text for key, text in headers.items()}
        self._send(code, json.dumps(value).encode(), {"Content-Type": "application/json", **named})

    # Who is asking ---------------------------------------------------------------------------------------------------

    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _refused(self, name: str) -> bool:
        """Answers where the repository is not for this one; as the hub, which does not say what is private."""
        if "Authorization" in self.headers and not self._known():
            self._json(401, {"error": "Invalid credentials in Authorization header"},
                       X_Error_Message="Invalid credentials in Authorization header")  # fmt: skip
            return True
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self._known()):
            self._json(404 if self._known() else 401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound",
                       X_Error_Message="Repository not found")  # fmt: skip
            return True
        if found.gated:
            self._json(403, {"error": "gated"}, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
            return True
        return False

    def _may_not_write(self) -> bool:
        if not self._known() or not self.hub.may_write:
            self._json(403, {"error": f"{TOKEN} may not"}, X_Error_Message="You don't have the rights")
            return True
        return False

    # Routes ----------------------------------------------------------------------------------------------------------

    def whoami(self, _: dict[str, str], __: bytes) -> None:
        if self._known():
            self._json(200, {"type": "user", "name": "org", "auth": {"accessToken": {"role": "write"}}})
        else:
            self._json(401, {"error": "Invalid credentials in Authorization header"})

    def validate(self, _: dict[str, str], body: bytes) -> None:
        assert json.loads(body)["content"].startswith("---\n")
        self._json(200, {"errors": [], "warnings": []})

    def create(self, _: dict[str, str], body: bytes) -> None:
        if self._may_not_write():
            return
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            self._json(409, {"error": "You already created this model repo"})
            return
        private = asked.get("private", asked.get("visibility") == "private")
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        self._json(200, {"url": f"{self.hub.endpoint}/{name}"})

    def info(self, named: dict[str, str], _: bytes) -> None:
        if self._refused(named["repo"]):
            return
        found = self.hub.repositories[named["repo"]]
        at = found.at(named.get("revision") or "main")
        if at is None:
            self._json(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")
            return
        siblings = [{"rfilename": name} for name in sorted(at[1])]
        self._json(200, {"id": named["repo"], "modelId": named["repo"], "sha": at[0], "private": found.private,
                         "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})  # fmt: skip

    def tree(self, named: dict[str, str], _: bytes) -> None:
        if self._refused(named["repo"]):
            return
        at = self.hub.repositories[named["repo"]].at(named["revision"])
        assert at is not None
        self._json(200, [{"type": "file", "path": name, "size": len(content), "oid": _git_hash(content)}
                         for name, content in sorted(at[1].items())])  # fmt: skip

    def resolve(self, named: dict[str, str], _: bytes) -> None:
        if self._refused(named["repo"]):
            return
        at = self.hub.repositories[named["repo"]].at(named["revision"])
        if at is None or named["file"] not in at[1]:
            self._json(404, {"error": "no such entry"}, X_Error_Code="EntryNotFound")
            return
        content = at[1][named["file"]]
        self._send(200, content, {"ETag": f'"{_git_hash(content)}"', "X-Repo-Commit": at[0]})

    def preupload(self, named: dict[str, str], body: bytes) -> None:
        if self._refused(named["repo"]) or self._may_not_write():
            return
        files = self.hub.repositories[named["repo"]].files
        answers = []
        for file in json.loads(body)["files"]:
            name = file["path"]
            large = name.endswith(".safetensors")
            old = files.get(name)
            oid = None if old is None else hashlib.sha256(old).hexdigest() if large else _git_hash(old)
            answers.append({"path": name, "uploadMode": "lfs" if large else "regular",
                            "shouldIgnore": name.endswith(self.hub.ignores) and bool(self.hub.ignores),
                            "oid": oid})  # fmt: skip
        self._json(200, {"files": answers})

    def batch(self, named: dict[str, str], body: bytes) -> None:
        if self._refused(named["repo"]) or self._may_not_write():
            return
        objects: list[dict[str, Any]] = []
        for one in json.loads(body)["objects"]:
            answer = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.hub.blobs:
                answer["actions"] = {"upload": {"href": f"{self.hub.endpoint}/blobs/{one['oid']}"}}
            objects.append(answer)
        self._json(200, {"transfer": "basic", "objects": objects})

    def put(self, named: dict[str, str], body: bytes) -> None:
        assert hashlib.sha256(body).hexdigest() == named["oid"]
        self.hub.blobs[named["oid"]] = body
        self.hub.uploaded.append(len(body))
        self.hub.on_upload()
        self._send(200, b"")

    def commit(self, named: dict[str, str], body: bytes) -> None:
        if self._refused(named["repo"]) or self._may_not_write():
            return
        found = self.hub.repositories[named["repo"]]
        files = dict(found.files)
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        name = found.commit(files)
        self._json(200, {"commitUrl": f"{self.hub.endpoint}/{named['repo']}/commit/{name}", "commitOid": name})


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest()


_ROUTES = [
    (r"GET /api/whoami-v2", _Handler.whoami),
    (r"POST /api/validate-yaml", _Handler.validate),
    (r"POST /api/repos/create", _Handler.create),
    (rf"GET /api/models/{_REPO}", _Handler.info),
    (rf"GET /api/models/{_REPO}/revision/(?P<revision>[^/]+)", _Handler.info),
    (rf"GET /api/models/{_REPO}/tree/(?P<revision>[^/]+)", _Handler.tree),
    (rf"POST /api/models/{_REPO}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    (rf"POST /api/models/{_REPO}/commit/(?P<revision>[^/]+)", _Handler.commit),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /blobs/(?P<oid>[0-9a-f]+)", _Handler.put),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler.resolve),
]


@contextlib.contextmanager
def serve() -> Iterator[FakeHub]:
    """A hub that answers while the context is open."""
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use(hub: FakeHub, patch: pytest.MonkeyPatch, cache: Path, token: str | None = TOKEN) -> None:
    """Makes the client in this process ask that hub, with a token and a cache of its own, without waiting."""
    from huggingface_hub import constants

    patch.setattr(constants, "ENDPOINT", hub.endpoint)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    for name in ("HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN"):
        patch.delenv(name, raising=False)
    patch.delenv("HF_TOKEN", raising=False)
    if token is not None:
        patch.setenv("HF_TOKEN", token)
