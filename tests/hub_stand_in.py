"""A stand-in for the Hugging Face Hub: the part of its HTTP API that huggingface_hub uses for models, with
faults on demand.

`hub` is a fixture: a server on this machine that huggingface_hub has been pointed at, with an empty cache and no token.
Repositories are lists of commits in memory; LFS files are served by a second server, as by the Hub's CDN.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
import types
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from conftest import files_of

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"
LFS_ENDINGS = (".safetensors", ".bin")


def git_sha1(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@dataclass
class Repo:
    """Branches of commits; a commit is {path: bytes}."""

    private: bool = False
    gated: bool = False
    commits: dict = field(default_factory=dict)
    branches: dict = field(default_factory=dict)

    def commit(self, files, branch="main"):
        number = str(len(self.commits)) + repr(sorted((n, sha256(d)) for n, d in files.items()))
        sha = hashlib.sha1(number.encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha

    @property
    def head(self):
        return self.branches["main"]

    def find(self, revision):
        return revision if revision in self.commits else self.branches.get(revision)


@dataclass
class Fault:
    """What happens to requests whose "METHOD path" matches `pattern`, the first `times` of them."""

    pattern: str
    kind: str
    value: object = None
    times: int = 10**9


class Hub:
    """The state of the stand-in."""

    token = TOKEN
    """The only access token that is accepted."""

    def __init__(self):
        self.repos, self.lfs, self.faults = {}, {}, []
        self.requests = []  # (method, path, was there a token)
        self.answers = {}  # changes to what is said: {"listing": f(json), "headers": f(path, dict)}
        self.servers = [self._serve(_Api), self._serve(_Cdn)]
        self.url, self.cdn = (f"http://127.0.0.1:{s.server_address[1]}" for s in self.servers)

    def _serve(self, handler):
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), {"hub": self}))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server

    def stop(self):
        """No connection is accepted any more."""
        import huggingface_hub

        for server in self.servers:
            server.shutdown()
            server.server_close()
        huggingface_hub.close_session()  # it would keep its open connections

    def add(self, name, folder=None, files=(), **settings):
        """A repository with the files of a folder."""
        found = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", **dict(files)}
        if folder is not None:
            found |= files_of(folder)
        repo = self.repos.setdefault(name, Repo(**settings))
        repo.commit(found)
        self.lfs |= {sha256(d): d for n, d in found.items() if n.endswith(LFS_ENDINGS)}
        return repo

    def fault(self, pattern, kind, value=None, times=10**9):
        """kind: "status" (value: code), "slow" (seconds), "truncate" (share kept), "corrupt", "drop",
        "say" (headers, body)."""
        self.faults.append(Fault(pattern, kind, value, times))

    def fault_for(self, request):
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.pattern, request):
                fault.times -= 1
                return fault
        return None

    def asked(self, pattern=""):
        return [
            f"{method} {path}" for method, path, _ in self.requests if re.search(pattern, f"{method} {path}")
        ]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (ConnectionError, ValueError):
            self.close_connection = True

    def _any(self):
        url = urlsplit(self.path)
        self.query, self.place = parse_qs(url.query), unquote(url.path)
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b""
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            self.body = self.rfile.read(length)
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.hub.requests.append((self.command, self.place, bool(self.token)))
        self.fault = self.hub.fault_for(f"{self.command} {self.place}")
        if self.fault:
            if self.fault.kind == "status":
                return self.answer(self.fault.value, {"error": "made to fail"})
            if self.fault.kind == "say":
                code, headers, body = self.fault.value
                return self.send(code, body, headers)
            if self.fault.kind == "slow":
                time.sleep(self.fault.value)
            if self.fault.kind == "drop":
                self.close_connection = True
                self.connection.close()
                return None
        return self.respond()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _any

    def answer(self, code, data=None, **headers):
        self.send(
            code,
            json.dumps(data if data is not None else {}).encode(),
            {"Content-Type": "application/json", **headers},
        )

    def refuse(self, code, kind, **headers):
        self.answer(code, {"error": kind}, **{"X-Error-Code": kind, "X-Error-Message": kind, **headers})

    def send(self, code, body, headers):
        fault = self.fault if self.fault and self.fault.kind in ("truncate", "corrupt") else None
        length = len(body)
        if fault and fault.kind == "corrupt" and self.command == "GET":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if fault and fault.kind == "truncate" and self.command == "GET":
            body = body[: int(len(body) * fault.value)]
            self.close_connection = True
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", headers.get("Content-Length", str(length)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def serve_bytes(self, data, headers):
        """With ranges."""
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if match and not self.hub.answers.get("no ranges"):
            start = int(match[1])
            self.send(
                206, data[start:], {**headers, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
            )
        else:
            self.send(200, data, headers)


class _Cdn(_Handler):
    def respond(self):
        oid = self.place.rpartition("/")[2]
        if self.command == "PUT":
            assert sha256(self.body) == oid
            self.hub.lfs[oid] = self.body
            return self.answer(200, {})
        return self.serve_bytes(self.hub.lfs[oid], {"ETag": f'"{oid}"'})


class _Api(_Handler):
    def respond(self):
        for pattern, method in (
            (r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self.info),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/.*)?", self.tree),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
            (r"/api/repos/create()", self.create),
            (r"/api/validate-yaml()", lambda _: self.answer(200, {"errors": [], "warnings": []})),
            (r"/api/models/([^/]+/[^/]+)/branch/(.+)", self.branch),
            (r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self.preupload),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.batch),
            (r"/api/models/([^/]+/[^/]+)/commit/(.+)", self.commit),
        ):
            if match := re.fullmatch(pattern, self.place):
                return method(*match.groups())
        return self.refuse(404, "NotFound")

    def repo(self, name, write=False):
        """The repository, if this request may see it; else the Hub's refusal has been sent."""
        repo = self.hub.repos.get(name)
        if self.token not in ("", TOKEN):
            self.answer(
                401,
                {"error": "Invalid credentials in Authorization header"},
                **{"X-Error-Message": "Invalid credentials in Authorization header"},
            )
        elif repo is None or (repo.private and not self.token):
            self.refuse(401 if not self.token else 404, "RepoNotFound")
        elif repo.gated and self.command in ("GET", "HEAD") and "/resolve/" in self.place:
            self.refuse(403, "GatedRepo")
        elif write and not self.token:
            self.refuse(401, "RepoNotFound")
        else:
            return repo
        return None

    def at(self, name, revision):
        repo = self.repo(name)
        if repo is None:
            return None, None
        sha = repo.find(revision or "main")
        if sha is None:
            self.refuse(404, "RevisionNotFound")
            return None, None
        return sha, repo.commits[sha]

    def info(self, name, revision=None):
        sha, files = self.at(name, revision)
        if sha is None:
            return None
        siblings = []
        for path, data in files.items():
            entry = {"rfilename": path}
            if self.query.get("blobs"):
                entry |= {"size": len(data), "blobId": git_sha1(data)}
                if path.endswith(LFS_ENDINGS):
                    entry["lfs"] = {"size": len(data), "sha256": sha256(data), "pointerSize": 130}
            siblings.append(entry)
        said = {
            "id": name,
            "modelId": name,
            "sha": sha,
            "private": self.hub.repos[name].private,
            "gated": False,
        }
        said |= {"tags": [], "downloads": 0, "likes": 0, "siblings": siblings}
        self.hub.answers.get("listing", lambda _: None)(said)
        return self.answer(200, said)

    def tree(self, name, revision):
        sha, files = self.at(name, revision)
        if sha is not None:
            self.answer(
                200,
                [{"type": "file", "path": p, "size": len(d), "oid": git_sha1(d)} for p, d in files.items()],
            )

    def resolve(self, name, revision, path):
        sha, files = self.at(name, revision)
        if sha is None:
            return None
        headers = {"X-Repo-Commit": sha}
        if path not in files:
            return self.refuse(404, "EntryNotFound", **headers)
        data = files[path]
        if not path.endswith(LFS_ENDINGS):
            headers["ETag"] = f'"{git_sha1(data)}"'
            self.hub.answers.get("headers", lambda *_: None)(path, headers)
            return self.serve_bytes(data, headers)
        headers |= {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data))}
        headers |= {
            "X-Xet-Hash": sha256(data),
            "X-Xet-Refresh-Route": f"{self.hub.url}/xet",
        }  # as of late, on the Hub
        headers["Location"] = f"{self.hub.cdn}/lfs/{sha256(data)}"
        self.hub.answers.get("headers", lambda *_: None)(path, headers)
        return self.send(302, b"", headers)

    def create(self, _):
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if self.token != TOKEN:
            return self.answer(401, {"error": "Invalid username or password."})
        if name.startswith("foreign/"):
            return self.answer(
                403, {"error": "You don't have the rights to create a model under this namespace"}
            )
        if name in self.hub.repos:
            return self.answer(
                409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}
            )
        self.hub.add(name, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return self.answer(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def branch(self, name, branch):
        repo = self.repo(name, write=True)
        if repo is None:
            return None
        if branch in repo.branches:
            return self.answer(409, {"error": "Reference already exists"})
        repo.branches[branch] = repo.head
        return self.answer(200, {})

    def preupload(self, name, revision):
        repo = self.repo(name, write=True)
        if repo is None:
            return None
        there = repo.commits[repo.find(revision)]
        said = []
        for file in json.loads(self.body)["files"]:
            path, lfs = file["path"], file["path"].endswith(LFS_ENDINGS)
            entry = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if path in there:
                entry["oid"] = (sha256 if lfs else git_sha1)(there[path])
            said.append(entry)
        return self.answer(200, {"files": said})

    def batch(self, name):
        if self.repo(name, write=True) is None:
            return None
        said = []
        for asked in json.loads(self.body)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.lfs:
                entry["actions"] = {"upload": {"href": f"{self.hub.cdn}/lfs/{asked['oid']}"}}
            said.append(entry)
        return self.answer(200, {"transfer": "basic", "objects": said})

    def commit(self, name, branch):
        repo = self.repo(name, write=True)
        if repo is None:
            return None
        files = dict(repo.commits[repo.branches[branch]])
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header" and value.get("parentCommit") not in (None, repo.branches[branch]):
                return self.answer(
                    412, {"error": "A commit has happened since. Please refresh and try again."}
                )
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(files, branch)
        return self.answer(
            200, {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"}
        )


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The stand-in, in place of the Hub."""
    import huggingface_hub
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    from phatgoose.experts.hub import fetch as hub_files

    stand_in = Hub()
    for name, value in {
        "ENDPOINT": stand_in.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": stand_in.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
        "HF_HUB_DISABLE_XET": True,
        "HF_TOKEN_PATH": str(tmp_path / "no-token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    quick = types.SimpleNamespace(
        **{**vars(time), "sleep": lambda _: None}
    )  # what is waited for isn't ours to test
    for module in (file_download, _http, hub_files):
        monkeypatch.setattr(module, "time", quick)
    monkeypatch.setenv("PHATGOOSE_CACHE", str(tmp_path / "phatgoose-cache"))

    def hurry():
        """Waits for no answer longer than 0.3 s."""
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
        monkeypatch.setattr(hub_files, "TIMEOUT_SECONDS", 0.3)
        monkeypatch.setattr(file_download, "_ETAG_RETRY_TIMEOUT", 0.3)

    stand_in.hurry = hurry
    huggingface_hub.close_session()
    yield stand_in
    stand_in.stop()


@pytest.fixture
def login(hub, monkeypatch):
    """The stand-in, with its token in the environment."""
    monkeypatch.setenv("HF_TOKEN", hub.token)
    return hub


MADE: dict = {}


@pytest.fixture
def made(request, tmp_path):
    """made(name, build) → a folder with the files of the folder that build(make_base, make_expert) returned,
    built once."""

    def make(name, build):
        if name not in MADE:
            folder = build(*map(request.getfixturevalue, ("make_base", "make_expert")))
            MADE[name] = files_of(folder)
        for path, data in MADE[name].items():
            target = tmp_path / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        return tmp_path / name

    return make
