"""A small hub on the loopback interface: what huggingface_hub asks of the real one to download, to read headers and to
upload, and what can go wrong meanwhile.

Large files (`is_large`) are LFS objects, with their sha256 as ETag, as on the hub. With `State.xet` they lie in Xet
storage as well: a folder that hf_xet itself reads and writes.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Answer = tuple[int, bytes, dict[str, str]]  # status, body, headers; status 0 cuts the connection


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".gguf", ".parquet", ".bin"))


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    """A repository: its branches, each a commit and its files, and how many commits were made."""

    files: dict[str, bytes]
    private: bool = False
    commits: list[tuple[str, list[str]]] = field(default_factory=list)  # (branch, names of files), in their order
    branches: dict[str, tuple[str, dict[str, bytes]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.branches.setdefault("main", (COMMIT, self.files))

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        by_commit = {commit: (commit, files) for commit, files in self.branches.values()}
        return self.branches.get(revision) or by_commit.get(revision) or (revision == "refs/pr/1" and self.at("main")) \
            or None  # fmt: skip


@dataclass
class Xet:
    """Xet storage in a folder, and the hashes by which it knows files, by their sha256."""

    folder: Path
    hashes: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"local://{self.folder}"

    def store(self, content: bytes) -> None:
        import hf_xet

        with hf_xet.XetSession().new_upload_commit(endpoint=self.url) as commit:
            handle = commit.start_upload_bytes(content, sha256=hf_xet.COMPUTE_SHA256)
        self.hashes[hashlib.sha256(content).hexdigest()] = handle.result().xet_info.hash

    def expect(self, path: Path) -> None:
        """Know a file that is to be uploaded, by the hash that it will have."""
        import hf_xet

        self.hashes[hashlib.sha256(path.read_bytes()).hexdigest()] = hf_xet.hash_files([str(path)])[0].hash

    def load(self, sha256: str, size: int) -> bytes:
        """Raises where it was not uploaded."""
        import hf_xet

        path = self.folder / sha256
        with hf_xet.XetSession().new_file_download_group(endpoint=self.url) as group:
            group.start_download_file(hf_xet.XetFileInfo(self.hashes[sha256], size), str(path))
        return path.read_bytes()


@dataclass
class State:
    """Repositories by path ("owner/name", "datasets/owner/name"), LFS objects by sha256, what was sent and received,
    and faults: `broken` answers for a part of a path, always; `faults` once each, in their order, (part of "METHOD
    path", answer), and of `cuts` a body ends after so many bytes."""

    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    sent: list[tuple[str, int]] = field(default_factory=list)
    received: list[tuple[str, int]] = field(default_factory=list)  # (sha256, bytes) of uploads
    broken: dict[str, Answer] = field(default_factory=dict)
    faults: list[tuple[str, Answer]] = field(default_factory=list)
    cuts: list[tuple[str, int]] = field(default_factory=list)
    spoiled: list[str] = field(default_factory=list)  # names of files whose last byte is another, once each
    # Names of files that stop in the middle: what is set when half was sent, and what the other half waits for.
    held: dict[str, tuple[threading.Event, threading.Event]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    xet: Xet | None = None


class Hub(BaseHTTPRequestHandler):
    state: State
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.respond()

    def do_GET(self) -> None:
        self.respond()

    def do_POST(self) -> None:
        self.respond()

    def do_PUT(self) -> None:
        self.respond()

    def respond(self) -> None:
        url = urlsplit(self.path)
        path, asked = url.path, f"{self.command} {url.path}"
        self.state.requests.append(asked)
        for part, answer in self.state.broken.items():
            if part in path:
                return self.answer(*answer)
        for fault in self.state.faults:
            if fault[0] in asked:
                self.state.faults.remove(fault)
                return self.answer(*fault[1])
        if self.command == "PUT":
            return self.receive(path.rpartition("/")[2])
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            errors = [{"message": "license must be a string"}] if "license: [" in json.loads(body)["content"] else []
            return self.json({"errors": errors, "warnings": []}, 400 if errors else 200)
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(json.loads(body))
        if path.startswith("/lfs/verify/"):
            return self.answer(200 if path.rpartition("/")[2] in self.state.objects else 404, b"{}", {})
        if path.startswith("/api/"):
            return self.api(path, url.query, body)
        return self.file(path)

    def repo_of(self, path: str) -> tuple[Repo | None, str]:
        """The repository that a path is of, and what comes behind it."""
        for name, repo in self.state.repos.items():
            if path == f"/{name}" or path.startswith(f"/{name}/"):
                return repo, path[len(name) + 2 :]
        return None, ""

    def api(self, path: str, query: str, body: bytes) -> None:
        repo, rest = self.repo_of(path.removeprefix("/api").replace("/models/", "/", 1))
        verb, _, argument = rest.partition("/")
        if repo is None:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if self.command == "POST" and verb == "branch":
            if unquote(argument) in repo.branches:
                return self.answer(409, b"{}", {})
            repo.branches[unquote(argument)] = (COMMIT[::-1], dict(repo.branches["main"][1]))
            return self.json({})
        if verb in ("xet-read-token", "xet-write-token"):
            assert self.state.xet is not None
            url = self.state.xet.url
            content = json.dumps({"casUrl": url, "accessToken": "x", "exp": 2**32}).encode()
            names = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "x", "X-Xet-Token-Expiration": str(2**32)}
            return self.answer(200, content, names)
        revision = (
            unquote(argument.partition("/")[0]) if verb in ("revision", "tree", "preupload", "commit") else "main"
        )
        found = repo.at(revision)
        if found is None:
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if verb == "preupload":
            return self.json({"files": [self.mode(found[1], entry) for entry in json.loads(body)["files"]]})
        if verb == "commit":
            return self.commit(repo, revision, [json.loads(line) for line in body.splitlines()])
        if verb == "tree":
            return self.json([{"type": "file", **self.entry(name, found[1][name], "path")} for name in found[1]])
        siblings = [{"rfilename": name} for name in found[1]]
        if "blobs" in parse_qs(query):
            siblings = [self.entry(name, content, "rfilename") for name, content in found[1].items()]
        name = next(name for name, held in self.state.repos.items() if held is repo)
        name = name.removeprefix("datasets/")
        return self.json({"id": name, "sha": found[0], "private": repo.private, "siblings": siblings})

    @staticmethod
    def entry(name: str, content: bytes, key: str) -> dict[str, Any]:
        oid = git_hash(content)
        entry: dict[str, Any] = {key: name, "size": len(content), "blobId": oid, "oid": oid}
        if is_large(name):
            sha256 = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"sha256": sha256, "oid": sha256, "size": len(content), "pointerSize": 134}
        return entry

    @staticmethod
    def mode(files: Mapping[str, bytes], entry: Mapping[str, Any]) -> dict[str, Any]:
        mode = "lfs" if is_large(entry["path"]) else "regular"
        held = files.get(entry["path"])
        oid = None if held is None else hashlib.sha256(held).hexdigest() if mode == "lfs" else git_hash(held)
        return {"path": entry["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def create(self, asked: Mapping[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.state.repos:
            return self.json({"url": f"{self.origin}/{name}"}, 409)
        private = asked.get("private") or asked.get("visibility") == "private"
        self.state.repos[name] = Repo({".gitattributes": b"*.safetensors filter=lfs\n"}, private=bool(private))
        return self.json({"url": f"{self.origin}/{name}"})

    def batch(self, asked: Mapping[str, Any]) -> None:
        objects = []
        for wanted in asked["objects"]:
            oid, found = wanted["oid"], {"oid": wanted["oid"], "size": wanted["size"]}
            if oid not in self.state.objects:
                found["actions"] = {
                    "upload": {"href": f"{self.origin}/lfs/{oid}", "header": {}},
                    "verify": {"href": f"{self.origin}/lfs/verify/{oid}", "header": {}},
                }
            objects.append(found)
        self.json({"transfer": "basic", "objects": objects})

    def receive(self, oid: str) -> None:
        size = int(self.headers["Content-Length"])
        if cut := next((cut for cut in self.state.cuts if f"PUT {oid}".startswith(cut[0])), None):
            self.state.cuts.remove(cut)
            self.rfile.read(cut[1])
            return self.answer(0, b"", {})
        content = self.rfile.read(size)
        assert hashlib.sha256(content).hexdigest() == oid
        self.state.objects[oid] = content
        self.state.received.append((oid, size))
        return self.answer(200, b"", {})

    def commit(self, repo: Repo, branch: str, lines: list[dict[str, Any]]) -> None:
        files = dict(repo.branches[branch][1])
        names = []
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if self.state.xet is not None and value["oid"] not in self.state.objects:
                    self.state.objects[value["oid"]] = self.state.xet.load(value["oid"], value["size"])
                files[value["path"]] = self.state.objects[value["oid"]]
            names += [value["path"]] if "path" in value else []
        commit = hashlib.sha1(f"{len(repo.commits)} {branch}".encode()).hexdigest()
        repo.commits.append((branch, names))
        repo.branches[branch] = (commit, files)
        name = next(name for name, held in self.state.repos.items() if held is repo)
        self.json({"success": True, "commitOid": commit, "commitUrl": f"{self.origin}/{name}/commit/{commit}"})

    def file(self, path: str) -> None:
        repo, rest = self.repo_of(path)
        if repo is None:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        _, revision, name = (unquote(part) for part in rest.split("/", 2))
        found = repo.at(revision)
        if found is None or name not in found[1]:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        content = found[1][name]
        headers = {"ETag": f'"{git_hash(content)}"', "X-Repo-Commit": found[0], "Accept-Ranges": "bytes"}
        if is_large(name):
            sha256 = hashlib.sha256(content).hexdigest()
            headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
            if self.state.xet is not None:
                route = f"{self.origin}/api/models/owner/name/xet-read-token/{revision}"
                headers |= {"X-Xet-Hash": self.state.xet.hashes[sha256], "X-Xet-Refresh-Route": route}
        wanted = self.headers.get("Range")
        if wanted and self.command == "GET":
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            content = content[int(first) : int(last) + 1 if last else None]
        if self.command == "GET" and name in self.state.spoiled and content[-1:] == found[1][name][-1:]:
            self.state.spoiled.remove(name)
            content = content[:-1] + bytes([content[-1] ^ 1])
        cut = next((cut for cut in self.state.cuts if self.command == "GET" and cut[0] == name), None)
        if cut is not None and len(content) > cut[1]:
            self.state.cuts.remove(cut)
            headers["Content-Length"], content = str(len(content)), content[: cut[1]]
            self.close_connection = True
        self.state.sent.append((name, 0 if self.command == "HEAD" else len(content)))
        if self.command == "GET" and name in self.state.held:
            half, go_on = self.state.held[name]
            headers["Content-Length"], rest = str(len(content)), content[len(content) // 2 :]
            self.answer(206 if wanted else 200, content[: len(content) // 2], headers)
            half.set()
            go_on.wait(30)
            with contextlib.suppress(OSError):  # nobody waits for it any more
                self.wfile.write(rest)
            return None
        return self.answer(206 if wanted else 200, content, headers)

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def json(self, value: object, status: int = 200) -> None:
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        if not status:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | dict(headers)).items():
            self.send_header(name, value)
        if status >= 400:  # what was sent with the request may not have been read
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@dataclass(frozen=True)
class Served:
    """A hub that runs, `files` being those of owner/name at main, and how other processes find it."""

    environment: dict[str, str]
    state: State
    files: dict[str, bytes]

    @property
    def sent(self) -> list[tuple[str, int]]:
        return self.state.sent

    @property
    def broken(self) -> dict[str, Answer]:
        return self.state.broken


@contextmanager
def serve(files: dict[str, bytes], home: Path) -> Iterator[Served]:
    """A hub that has these in owner/name; other processes keep what they download in `home`."""
    state = State({"owner/name": Repo(files)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Hub,), {"state": state}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    yield Served(environment, state, files)
    server.shutdown()
    server.server_close()


def use(hub: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have huggingface_hub in this process ask that hub."""
    endpoint = hub.environment["HF_ENDPOINT"]
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", hub.environment["HF_HOME"] + "/hub")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()  # the client of another test knows another proxy, and that it is offline
