"""Streams and pushes through Xet storage, by hf_xet itself, which keeps it in a folder for a small hub of our own."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from hub_server import Served, Xet, serve, use
from huggingface_hub import constants
from huggingface_hub.utils._xet import abort_xet_session

import dsv2quant as dq
from dsv2quant.storage import hub_errors

hf_xet = pytest.importorskip("hf_xet")
pytestmark = pytest.mark.skipif(not hasattr(hf_xet, "XetSession"), reason="an hf_xet of before its sessions")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Served]:
    """A hub that has a model in owner/name, in four shards that lie in Xet storage; this process asks it, with
    hf_xet."""
    source = tiny.write_checkpoint(tmp_path / "source", tiny.LITE, shards=4)
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    with serve(files, tmp_path / "hf") as served:
        use(served, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        served.state.xet = Xet(tmp_path / "cas")
        for name, content in files.items():
            if name.endswith(".safetensors"):
                served.state.xet.store(content)
        yield served


def test_a_stream_comes_by_xet_with_the_bytes_of_the_folder(hub, tmp_path, capfd):
    dq.convert("owner/name", tmp_path / "out", scheme="fp8-channel", stream_hub=True)
    dq.convert(tmp_path / "source", tmp_path / "other", scheme="fp8-channel")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "other/model.safetensors").read_bytes()
    whole = {name: len(content) for name, content in hub.files.items() if name.endswith(".safetensors")}
    assert not [name for name, size in hub.sent if size >= whole.get(name, size + 1)]  # none by plain HTTP
    assert "reconstruct" not in capfd.readouterr().err  # no bar of its own


def test_what_is_pushed_by_xet_arrives_whole(hub, tmp_path):
    out = tmp_path / "out"
    dq.convert(tmp_path / "source", out, scheme="fp8-channel")
    dq.verify(out, tmp_path / "source")
    weights = out / "model.safetensors"
    hub.state.xet.expect(weights)
    made = dq.push(out, "me/lite")
    assert weights.name in made.sent
    files = hub.state.repos["me/lite"].branches["main"][1]
    assert files[weights.name] == weights.read_bytes()
    assert hub.state.received == []  # nothing by LFS
    assert dq.push(out, "me/lite").sent == []


def test_storage_that_is_away_is_one_line(hub, tmp_path, monkeypatch, cli):
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "1")
    abort_xet_session()  # the next one reads that
    monkeypatch.setattr(hub_errors, "PAUSE", 0)
    monkeypatch.setattr(hub_errors, "TRIES", 2)
    monkeypatch.setattr(Xet, "url", "http://127.0.0.1:9")
    ran = cli("convert", "owner/name", "--fp8=channel", "--stream-hub", "-q", "-o", tmp_path / "out")
    assert ran.code == 3
    assert ran.err.splitlines()[-1].startswith("error: owner/name: the transfer failed: ")
    dq.convert(tmp_path / "source", tmp_path / "local", scheme="fp8-channel")
    ran = cli("push", tmp_path / "local", "me/lite", "--force", "-q")
    assert ran.code == 3
    assert ran.err.splitlines()[-1].startswith("error: me/lite: the hub can't be reached: ")


def test_ctrl_c_ends_a_download(hub, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # storage that takes requests, and never answers
        silent.settimeout(60)
        monkeypatch.setattr(Xet, "url", f"http://127.0.0.1:{silent.getsockname()[1]}")
        args = ("convert", "owner/name", "--fp8=channel", "--stream-hub", "-q", "-o", str(tmp_path / "out"))
        environment = hub.environment | {"HF_HUB_DISABLE_XET": "0", "PYTHONPATH": str(Path(__file__).parent.parent)}
        running = subprocess.Popen(
            [sys.executable, "-m", "dsv2quant", *args], env=environment, stderr=subprocess.PIPE, text=True
        )
        connection, _ = silent.accept()
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=60)
        connection.close()
    assert (running.returncode, said.strip().splitlines()[-1]) == (130, "interrupted")
    assert "Traceback" not in said
