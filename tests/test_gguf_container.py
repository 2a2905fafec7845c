"""The GGUF container against the gguf library, and against files that are damaged in every way."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf_files import CONFIG, MIXED, add_metadata, stacked, write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import random_weights

from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.errors import InputError
from dsv2quant.storage.gguf import ALIGNMENT, pack_header, padded, read

KEYS = {  # every type of value
    "u8": ("add_uint8", 200), "i8": ("add_int8", -100), "u16": ("add_uint16", 60000), "i16": ("add_int16", -30000),
    "u32": ("add_uint32", 1 << 31), "i32": ("add_int32", -(1 << 30)), "u64": ("add_uint64", 1 << 63),
    "i64": ("add_int64", -(1 << 62)), "f32": ("add_float32", 0.5), "f64": ("add_float64", 0.1),
    "bool": ("add_bool", True), "text": ("add_string", "nаïve ｜"), "texts": ("add_array", ["a", "", "ñ"]),
    "integers": ("add_array", [1, -2, 3]), "numbers": ("add_array", [0.5, 2.0]), "truths": ("add_array", [True, False]),
}  # fmt: skip
TENSORS = {"a.weight": (3, 64), "b": (5,), "stack.weight": (2, 3, 32), "c.weight": (1, 32)}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = GGUFWriter(path, "deepseek2")
    for key, (method, value) in KEYS.items():
        getattr(writer, method)(key, value)
    for name, shape in TENSORS.items():
        writer.add_tensor(name, np.ones(shape, np.float32))
    writer.add_tensor("q", np.zeros((4, 68), np.uint8), raw_dtype=GGMLQuantizationType.Q8_0)
    finish(writer)
    return path


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_reads_what_the_gguf_library_writes(small):
    found, theirs = read(small), GGUFReader(small)
    assert {key: value.value for key, value in found.metadata.items() if key != "general.architecture"} == {
        key: pytest.approx(value) if isinstance(value, float) else value for key, (_, value) in KEYS.items()
    }
    for ours, wanted in zip(found.tensors, theirs.tensors, strict=True):
        assert (ours.name, ours.type, ours.nbytes) == (wanted.name, wanted.tensor_type.name, wanted.n_bytes)
        assert ours.shape == tuple(int(n) for n in wanted.shape)[::-1]
        assert found.data_start + ours.begin == wanted.data_offset


def test_a_header_packs_to_the_bytes_it_was_read_from(small):
    found = read(small)
    assert pack_header(found.metadata, found.tensors) == small.read_bytes()[: found.data_start]
    assert found.data_start % ALIGNMENT == 0


def test_another_alignment(tmp_path):
    writer = GGUFWriter(tmp_path / "m.gguf", "deepseek2")
    writer.add_custom_alignment(256)
    for name in ("a", "b"):
        writer.add_tensor(name, np.ones(5, np.float32))
    finish(writer)
    found = read(tmp_path / "m.gguf")
    assert [t.begin for t in found.tensors] == [0, 256]
    assert found.data_start == GGUFReader(tmp_path / "m.gguf").tensors[0].data_offset


# Damage


def bytes_of(small: Path) -> bytearray:
    return bytearray(small.read_bytes())


def opens(path: Path, data: bytes) -> bool:
    """Whether a file of these bytes can be read; anything but InputError is a bug."""
    path.write_bytes(data)
    try:
        read(path)
    except InputError:
        return False
    return True


def test_truncated_anywhere(small, tmp_path):
    data, found = bytes_of(small), read(small)
    last = found.tensors[-1]
    end = found.data_start + last.begin + last.nbytes
    assert not any(opens(tmp_path / "m.gguf", data[:length]) for length in [*range(found.data_start), end - 1])
    assert opens(tmp_path / "m.gguf", data[:end])  # what pads the last tensor may be missing, as for llama.cpp


def at_tensor(data: bytes, name: str) -> int:
    """Where a tensor's rank lies, behind its name."""
    packed = struct.pack("<Q", len(name)) + name.encode()
    return data.index(packed) + len(packed)


def at_value(data: bytes, key: str) -> int:
    """Where a value lies, behind its key and its type."""
    return at_tensor(data, key) + 4


def put(at: Callable[[bytes], int], layout: str, *values: int) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        struct.pack_into(f"<{layout}", data, at(data), *values)

    return change


def tensor(name: str, offset: int) -> Callable[[bytes], int]:
    return lambda data: at_tensor(data, name) + offset


def value(key: str, offset: int = 0) -> Callable[[bytes], int]:
    return lambda data: at_value(data, key) + offset


def replace(old: bytes, new: bytes) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        at = data.index(old)
        data[at : at + len(old)] = new

    return change


def fixed(offset: int) -> Callable[[bytes], int]:
    return lambda data: offset


HUGE = (1 << 63) - 1
DAMAGE = {
    "magic": (put(fixed(0), "I", 0), "not a GGUF file"),
    "version 1": (put(fixed(4), "I", 1), "GGUF version 1, not 2 or 3"),
    "big-endian": (put(fixed(4), "I", 3 << 24), "GGUF version 50331648"),
    "tensors without end": (put(fixed(8), "Q", HUGE), "a count in its header is wrong"),
    "keys without end": (put(fixed(16), "Q", HUGE), "a count in its header is wrong"),
    "key of 2^63 bytes": (put(fixed(24), "Q", HUGE), "a count in its header is wrong"),
    "text without end": (put(value("text"), "Q", HUGE), "a count in its header is wrong"),
    "array without end": (put(value("integers", 4), "Q", HUGE), "a count in its header is wrong"),
    "array of texts without end": (put(value("texts", 4), "Q", HUGE), "a count in its header is wrong"),
    "array of arrays": (put(value("integers"), "I", 9), "integers has a value of the unknown type 9"),
    "unknown type of value": (put(value("u32", -4), "I", 77), "u32 has a value of the unknown type 77"),
    "text that is not UTF-8": (replace("｜".encode(), b"\xff\xfe\xfd"), "a string is not UTF-8"),
    "key twice": (replace(b"u16", b"u32"), "the key u32 occurs twice"),
    "tensor twice": (replace(b"c.weight", b"a.weight"), "a tensor's name occurs twice"),
    "rank 0": (put(tensor("b", 0), "I", 0), "b has 0 dimensions"),
    "rank 5": (put(tensor("b", 0), "I", 5), "b has 5 dimensions"),
    "no rows": (put(tensor("a.weight", 12), "Q", 0), "a.weight: F32 can't have the shape [0, 64]"),
    "rows without end": (put(tensor("a.weight", 12), "Q", HUGE), "b begins at 768, not behind the tensor before it"),
    "part of a block": (put(tensor("q", 4), "Q", 33), "q: Q8_0 can't have the shape [4, 33]"),
    "unknown block type": (put(tensor("b", 12), "I", 999), "b has the unknown type number 999"),
    "tensor on another": (put(tensor("b", 16), "Q", 0), "b begins at 0, not behind the tensor before it"),
    "hole": (put(tensor("b", 16), "Q", 800), "b begins at 800, not behind the tensor before it"),
    "not aligned": (put(tensor("b", 16), "Q", 769), "b begins at 769, not behind the tensor before it"),
    "last tensor beyond the end": (put(tensor("q", 12), "Q", 1 << 40), "truncated: "),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_clear_line(damage, small, tmp_path):
    change, message = DAMAGE[damage]
    data = bytes_of(small)
    change(data)
    (tmp_path / "m.gguf").write_bytes(data)
    tracemalloc.start()
    with pytest.raises(InputError) as error:
        read(tmp_path / "m.gguf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "m.gguf"))
    assert peak < 1 << 20


def test_a_large_file_does_not_make_a_large_header(small, tmp_path):
    """A count that the file is long enough for, all of it a hole."""
    data = bytes_of(small)
    put(value("integers"), "IQ", 0, 80_000_000)(data)
    with (tmp_path / "m.gguf").open("wb") as file:
        file.write(data)
        file.truncate(100_000_000)
    tracemalloc.start()
    with pytest.raises(InputError, match="a count in its header is wrong"):
        read(tmp_path / "m.gguf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize(("arrays", "values"), [(1, 60_000_000), (40, 60_000)])
def test_arrays_do_not_take_many_times_their_size(arrays, values, tmp_path):
    """60 million bytes were 1.2 GB of objects."""
    path = tmp_path / "m.gguf"
    with path.open("wb") as file:
        file.write(struct.pack("<4sIQQ", b"GGUF", 3, 0, arrays))
        for i in range(arrays):
            file.write(struct.pack("<Q2sIIQ", 2, f"{i:02}".encode(), 9, 0, values) + bytes(values))
    tracemalloc.start()
    with pytest.raises(InputError, match=r"m.gguf: .* is the end of more than 2,000,000 values"):
        read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 << 20


def test_more_tensors_than_any_model_has(tmp_path):
    """Two million headers took a minute."""
    path = tmp_path / "m.gguf"
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 100_001, 0) + bytes(4_000_000))
    with pytest.raises(InputError, match=r"m.gguf: 100,001 tensors, more than 100,000"):
        read(path)


@pytest.mark.parametrize("alignment", [0, 3, 4, 33, True, -32, "32", [32]])
def test_alignments_that_are_none(alignment, tmp_path):
    writer = GGUFWriter(tmp_path / "m.gguf", "deepseek2")
    kinds = {bool: "add_bool", str: "add_string", list: "add_array"}
    getattr(writer, kinds.get(type(alignment), "add_int32"))("general.alignment", alignment)
    writer.add_tensor("a", np.ones(5, np.float32))
    finish(writer)
    with pytest.raises(InputError, match=r"general.alignment is .*, not a power of two"):
        read(tmp_path / "m.gguf")


@pytest.mark.parametrize("length", [63, 64])
def test_names_are_as_short_as_in_ggml(length, tmp_path):
    """ggml/src/gguf.cpp refuses names of GGML_MAX_NAME bytes; gguf-py's writer does too, so this one is packed here."""
    name = "n" * length
    entry = struct.pack("<Q", length) + name.encode() + struct.pack("<IQIQ", 1, 8, 0, 0)
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + entry
    data = header.ljust(padded(len(header)), b"\0") + bytes(32)
    assert opens(tmp_path / "m.gguf", data) == (length < 64)


@pytest.mark.parametrize("flip", [0xFF, 0x01, 0x80])
def test_every_byte_of_the_header_flipped(flip, small, tmp_path):
    data = bytes_of(small)
    outcomes = set()
    for i in range(read(small).data_start):
        data[i] ^= flip
        outcomes.add(opens(tmp_path / "m.gguf", data))
        data[i] ^= flip
    assert outcomes == {True, False}  # a letter of a text may change; most bytes may not


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300), magic=st.booleans())
def test_any_bytes(data, magic, tmp_path):
    opens(tmp_path / "m.gguf", b"GGUF\3\0\0\0" + data if magic else data)


def test_a_model_with_any_byte_changed_opens_or_says_why(tmp_path):
    """The metadata too: whatever its values become, nothing but InputError comes of it."""
    path = tmp_path / "m.gguf"
    write_gguf(path, CONFIG, stacked(CONFIG, random_weights(CONFIG)), MIXED, tokenizer=False)
    open_checkpoint(path)
    rng = np.random.default_rng(0)
    header = read(path).data_start
    refused = 0
    with path.open("r+b") as file:
        original = file.read(header)
        for at in range(0, header, 2):
            at += int(rng.integers(2))
            file.seek(at)
            file.write(bytes([original[at] ^ int(rng.integers(1, 256))]))
            file.flush()
            try:
                open_checkpoint(path)
            except InputError:
                refused += 1
            file.seek(at)
            file.write(original[at : at + 1])
    assert refused > header // 4


def test_metadata_of_another_type_is_refused(tmp_path):
    """Every deepseek2 key as a text, a list and a huge number."""
    reference = GGUFWriter(None, "deepseek2")
    add_metadata(reference, CONFIG)
    arrays = {"output_norm.weight": np.ones(256, np.float32)}
    for key in [key for key in reference.kv_data[0] if key.startswith("deepseek2.")]:
        for method, wrong in (("add_string", "many"), ("add_array", [1, 2]), ("add_uint64", 1 << 62)):

            def change(writer: GGUFWriter, key: str = key, method: str = method, wrong: object = wrong) -> None:
                del writer.kv_data[0][key]
                getattr(writer, method)(key, wrong)

            write_gguf(tmp_path / "m.gguf", CONFIG, arrays, lambda name: "F32", tokenizer=False, change=change)
            with pytest.raises(InputError):
                open_checkpoint(tmp_path / "m.gguf")
