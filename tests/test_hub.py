"""Hub ids, against a small hub of our own on the loopback interface."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The few routes of the hub's HTTP API that downloads and header reads use."""

    files: dict[str, bytes]
    sent: list[tuple[str, int]]

    def do_HEAD(self) -> None:
        self.respond(head=True)

    def do_GET(self) -> None:
        self.respond(head=False)

    def respond(self, head: bool) -> None:
        path = urlsplit(self.path).path
        if path.startswith("/api/models/owner/name"):
            entries = [{"type": "file", "path": n, "size": len(b), "oid": digest(b)} for n, b in self.files.items()]
            info = {"id": "owner/name", "sha": COMMIT, "siblings": [{"rfilename": n} for n in self.files]}
            if "/revision/nowhere" in path or "/tree/nowhere" in path:
                self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, head)
            else:
                body = json.dumps(entries if "/tree/" in path else info).encode()
                self.answer(200, body, {"Content-Type": "application/json"}, head)
            return
        _, _, file = path.partition(f"/owner/name/resolve/{COMMIT}/")
        content = self.files.get(file)
        if not path.startswith("/owner/name/"):
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"}, head)
        elif content is None:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, head)
        else:
            headers = {"ETag": f'"{digest(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            wanted = self.headers.get("Range")
            if wanted and not head:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                content = content[int(first) : int(last) + 1 if last else None]
            self.sent.append((file, 0 if head else len(content)))
            self.answer(206 if wanted else 200, content, headers, head)

    def answer(self, status: int, body: bytes, headers: dict[str, str], head: bool) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if not head:
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub(lite, tmp_path) -> Iterator[tuple[dict[str, str], list[tuple[str, int]], dict[str, bytes]]]:
    """(environment, what was sent, files) of a hub that serves owner/name."""
    files = {path.name: path.read_bytes() for path in lite.iterdir()}
    files["pytorch_model.bin"] = b"pickle"
    files["modeling_deepseek.py"] = b"raise SystemExit"
    files["README.md"] = b"---\nlicense: other\nlicense_name: deepseek\n---\n"
    handler = type("Handler", (Hub,), {"files": files, "sent": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    yield environment, handler.sent, files
    server.shutdown()
    server.server_close()


def dsv2quant(environment: dict[str, str], *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dsv2quant", *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_plan_reads_headers_and_no_weights(hub):
    environment, sent, files = hub
    ran = dsv2quant(environment, "plan", "owner/name", "--fp8=channel", "--json")
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    assert (result["model"], result["revision"]) == ("owner/name", COMMIT)
    assert result["bytes_in"] == result["parameters"] * 2
    # huggingface_hub reads the first 100 kB of a shard, where headers usually end.
    assert sum(size for file, size in sent if file.endswith(".safetensors")) < 101_000
    assert len(files["model.safetensors"]) > 400_000


def test_convert_downloads_safely_and_records_the_commit(hub, tmp_path):
    environment, sent, _ = hub
    out = tmp_path / "out"
    ran = dsv2quant(environment, "convert", "owner/name", "--fp8=channel", "-o", out, "-q")
    assert ran.returncode == 0, ran.stderr
    assert not {file for file, _ in sent} & {"pytorch_model.bin", "modeling_deepseek.py"}
    assert json.loads((out / "dsv2quant.json").read_text())["source"] == {"model": "owner/name", "revision": COMMIT}
    card = (out / "README.md").read_text()
    assert "license_name: deepseek" in card
    assert "base_model: owner/name" in card
    assert f"at revision {COMMIT}" in card
    assert not (out / "modeling_deepseek.py").exists()
    sent.clear()
    offline = dsv2quant(environment, "plan", "owner/name", "--offline", "--json")
    assert json.loads(offline.stdout)["revision"] == COMMIT
    assert sent == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("plan", "owner/missing"), "owner/missing: no such model on the hub and no such folder"),
        (("plan", "owner/name", "--revision", "nowhere"), "owner/name: no such revision"),
        (("plan", "owner/name", "--offline"), "owner/name: not in the local cache"),
        (("convert", "owner/name", "--offline", "--fp8", "-o", "x"), "not in the local cache"),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(hub, args, message):
    ran = dsv2quant(hub[0], *args)
    assert ran.returncode == 3, ran.stderr
    assert message in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_a_hub_without_safetensors_and_a_hub_that_is_away(hub, tmp_path):
    environment, _, files = hub
    del files["model.safetensors"]
    ran = dsv2quant(environment, "plan", "owner/name")
    assert (ran.returncode, ran.stderr.count("\n")) == (3, 1)
    assert "only safetensors checkpoints are read" in ran.stderr
    ran = dsv2quant(environment | {"HF_ENDPOINT": "http://127.0.0.1:9"}, "plan", "owner/name")
    assert (ran.returncode, ran.stderr.count("\n")) == (3, 1), ran.stderr
    assert "the hub can't be reached" in ran.stderr
