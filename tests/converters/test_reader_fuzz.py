"""Whatever the bytes: a GGUFFile or a GGUFError, soon (processor time), with little memory."""

from __future__ import annotations

import math
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from gguf_builder import ARRAY, BOOL, F32, F64, I8, I64, STRING, U8, U32, U64, Builder, llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converters.errors import GGUFError
from converters.gguf.reader import GGUFFile, read_gguf

SECONDS = 1.0
#: Python objects weigh more than the bytes they came from; a bad length must not weigh at all.
BYTES_FOR_EACH_BYTE, BYTES_ALWAYS = 32, 256 * 1024


def vocabulary() -> Builder:
    b = Builder().set("general.architecture", STRING, "any")
    return b.set("tokenizer.ggml.tokens", ARRAY, (STRING, [f"token{n}" for n in range(50)]))


def nested() -> Builder:
    b = vocabulary().set(
        "deep", ARRAY, (ARRAY, [(ARRAY, [(U8, [1, 2]), (F32, [])]), (STRING, ["x"])])
    )
    return b.set("general.alignment", U32, 64)


FILES = {builder.__name__: builder().build() for builder in (llama, vocabulary, nested)}
HEADER = 1600  # bytes of each file in which to make changes: all of the header

HOSTILE = [0, 1, 2, 3, 7, 8, 9, 31, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "fuzzed.gguf"


def check(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    tracemalloc.start()
    start = time.process_time()
    try:
        file = read_gguf(path)
    except GGUFError as error:
        assert error.field and error.expected and error.found
        assert 0 <= error.offset <= len(content)
        str(error).encode()
    else:
        assert isinstance(file, GGUFFile)
        for tensor in file.tensors:
            assert tensor.raw().size == tensor.nbytes
    finally:
        took = time.process_time() - start
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert took < SECONDS
    assert peak < BYTES_FOR_EACH_BYTE * len(content) + BYTES_ALWAYS


fuzz = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
names = st.sampled_from(sorted(FILES))


@fuzz
@given(names, st.lists(st.tuples(st.integers(4, HEADER), st.integers(1, 255)), max_size=4))
def test_flipped_bytes(path: Path, name: str, flips: list[tuple[int, int]]) -> None:
    content = bytearray(FILES[name])
    for at, mask in flips:
        content[at % len(content)] ^= mask
    check(path, bytes(content))


@fuzz
@given(names, st.integers(4, HEADER), st.sampled_from(HOSTILE), st.sampled_from(["<I", "<Q"]))
def test_hostile_numbers(path: Path, name: str, at: int, number: int, kind: str) -> None:
    content = bytearray(FILES[name])
    size = struct.calcsize(kind)
    at %= len(content) - size
    content[at : at + size] = struct.pack("<Q", number)[:size]
    check(path, bytes(content))


@fuzz
@given(names, st.integers(0, HEADER), st.integers(0, 64), st.binary(max_size=64))
def test_spliced(path: Path, name: str, at: int, removed: int, added: bytes) -> None:
    content = FILES[name]
    check(path, content[:at] + added + content[at + removed :])


@fuzz
@given(st.binary(max_size=200), st.sampled_from([b"", b"GGUF", b"GGUF\3\0\0\0", b"GGUF\2\0\0\0"]))
def test_noise(path: Path, noise: bytes, start: bytes) -> None:
    check(path, start + noise)


ODD: list[tuple[int, Any]] = [
    (U8, 0), (I8, -1), (U64, 2**64 - 1), (F32, math.nan), (F64, math.inf), (BOOL, 1), (STRING, ""),
    (STRING, b"\xff"), (ARRAY, (U32, [])), (ARRAY, (F32, [1, math.nan])), (ARRAY, (STRING, ["a"])),
    (ARRAY, (I64, [-1] * 5)), (ARRAY, (BOOL, [0, 1])), (ARRAY, (ARRAY, [(U8, [1]), (ARRAY, [])])),
]  # fmt: skip
MORE = ["attention.key_length", "features_length", "ssm.state_size", "logit_scale", "some.key"]


KEYS = [*llama().keys, *(f"llama.{key}" for key in MORE), "split.count"]


@pytest.mark.parametrize("key", KEYS)
def test_any_value_under_any_key(path: Path, key: str) -> None:
    for kind, content in ODD:
        check(path, llama().set(key, kind, content).build())


@fuzz
@given(
    st.dictionaries(st.sampled_from(KEYS), st.sampled_from(ODD), min_size=1, max_size=3),
    st.sets(st.sampled_from(list(llama().keys)), max_size=3),
)
def test_keys_changed_and_dropped(
    path: Path, changed: dict[str, tuple[int, Any]], dropped: set[str]
) -> None:
    b = llama().drop(*dropped)
    for key, (kind, content) in changed.items():
        b.set(key, kind, content)
    check(path, b.build())


@pytest.mark.parametrize("name", sorted(FILES))
def test_truncated_within_bounds(path: Path, name: str) -> None:
    for length in range(0, min(HEADER, len(FILES[name])), 7):
        check(path, FILES[name][:length])
