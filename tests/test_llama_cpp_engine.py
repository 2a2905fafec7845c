"""llama.cpp as an engine: the file that llama-perplexity writes, and what comes of programs that fail. The programs
themselves are run in tests/clients/llama_cpp."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import pytest

from dsv2quant.engines import llama_cpp
from dsv2quant.engines.answers import Request
from dsv2quant.engines.llama_logits import LogitsFile, windows_written
from dsv2quant.errors import Dsv2quantError
from dsv2quant.progress import no_progress
from dsv2quant.text.tokenizer import Windows

WINDOWS, CTX = 3, 10
SCORED = CTX - 1 - CTX // 2


def as_written(logits: np.ndarray, ids: np.ndarray) -> bytes:
    """What llama-perplexity writes of logits [windows, scored, vocabulary], as its `log_softmax` has it, in float32."""
    vocabulary = logits.shape[-1]
    out = [b"_logits_", struct.pack("<3i", ids.shape[1], vocabulary, len(ids)), ids.astype("<i4").tobytes()]
    for row in logits.reshape(-1, vocabulary).astype(np.float32):
        most = row.max()
        least = max(row.min(), most - np.float32(16))
        log_sum = np.float32(np.log(np.exp((row - most).astype(np.float64)).sum()))
        scale = np.float32((most - least) / np.float32(65535))
        codes = np.rint((row - least) / scale) if scale else np.zeros(vocabulary)
        out.append(struct.pack("<2f", scale, least - most - log_sum))
        out.append(np.where(row > least, codes, 0).astype("<u2").tobytes() + b"\0\0" * (vocabulary % 2))
    return b"".join(out)


def ln(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    return (
        wide - np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1, keepdims=True)) - wide.max(-1, keepdims=True)
    )


@pytest.fixture(params=[600, 601], ids=["even", "odd"])
def written(request, tmp_path) -> tuple[Path, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    ids = rng.integers(request.param, size=(WINDOWS, CTX))
    logits = rng.normal(0, 2.5, (WINDOWS, SCORED, request.param)).astype(np.float32)
    logits[1] *= 3  # beyond what codes reach
    logits[2, 0] = 1.0  # an even distribution
    path = tmp_path / "logits.bin"
    path.write_bytes(as_written(logits, ids))
    return path, ids, ln(logits)


def test_distributions_come_back_within_what_16_bits_round(written):
    path, ids, wanted = written
    found = LogitsFile.opened(path)
    np.testing.assert_array_equal(found.ids, ids)
    assert (found.first, found.scored, found.vocabulary) == (CTX // 2, SCORED, wanted.shape[-1])
    for window, row in enumerate(wanted):
        logp, error = found.window(window)
        assert 0 < error <= 16 / 65535 / 2 * 1.001
        reached = row > row.max(-1, keepdims=True) - 16
        # Half a step, and what the sum to 1 shifts, which is less.
        assert np.abs(logp - row)[reached].max() < 1.5 * error + 1e-6
        assert (logp - row)[~reached].min(initial=1) > 0
    assert (wanted[1] < wanted[1].max(-1, keepdims=True) - 16).any()


def test_rounding_is_in_the_mean_kld_in_the_second_order(written):
    path, _, wanted = written
    logp, error = LogitsFile.opened(path).window(0)
    kld = (np.exp(wanted[0]) * (wanted[0] - logp)).sum(-1)
    assert np.abs(kld).max() < 4 * error**2 + 1e-7  # float32


def test_a_cut_file_is_refused_and_told_how_far_it_is(written, tmp_path):
    whole = written[0].read_bytes()
    cut = tmp_path / "cut.bin"
    per_window = (len(whole) - 20 - 4 * WINDOWS * CTX) // WINDOWS
    for size, done in [(0, 0), (19, 0), (60, 0), (len(whole) - 1, WINDOWS - 1), (len(whole) - per_window, WINDOWS - 1)]:
        cut.write_bytes(whole[:size])
        assert windows_written(cut) == done
        with pytest.raises(Dsv2quantError, match=re.escape("run it again")):
            LogitsFile.opened(cut)
    assert (windows_written(written[0]), windows_written(tmp_path / "none")) == (WINDOWS, 0)
    cut.write_bytes(b"_nothing" + whole[8:])
    with pytest.raises(Dsv2quantError, match="is no file of log-probabilities"):
        LogitsFile.opened(cut)


REQUEST = Request(Windows(np.zeros((1, 16), np.int64), 8), 600)


def test_programs_that_are_not_there_or_fail_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Dsv2quantError, match="llama-perplexity is not on PATH") as missing:
        llama_cpp.ask(Path("model.gguf"), "text", REQUEST, no_progress)
    program = tmp_path / "llama-perplexity"
    program.write_text("#!/bin/sh\necho '0.01.2 I load: so far'\necho '0.01.3 E load: magic is wrong'\nexit 3\n")
    program.chmod(0o755)
    with pytest.raises(Dsv2quantError, match=r"ended with exit code 3: load: magic is wrong$") as failed:
        llama_cpp.ask(Path("model.gguf"), "text", REQUEST, no_progress)
    assert (missing.value.exit_code, failed.value.exit_code) == (2, 3)


def test_a_dtype_is_not_what_llama_cpp_computes_in(cli):
    ran = cli("verify", "model.gguf", "--engine", "llama.cpp", "--dtype", "float32")
    assert (ran.code, "llama.cpp computes as its file's types have it" in ran.err) == (2, True)


@pytest.mark.parametrize(
    ("asked", "theirs", "wanted"),
    [
        ([[0, 5], [0, 6]], [[0, 5], [9, 6]], [[0, 5], [0, 6]]),  # BOS takes the place of each window's first
        ([[0, 5], [0, 6]], [[5, 9], [6, 7]], [[5, 9], [6, 7]]),  # it adds none
        ([[5, 9], [6, 7]], [[5, 9], [6, 7]], [[5, 9], [6, 7]]),  # neither does
    ],
)
def test_windows_begin_with_bos_where_llama_cpp_puts_it(asked, theirs, wanted):
    found = llama_cpp.begun(np.array(theirs), np.array(asked))
    np.testing.assert_array_equal(found, wanted)
