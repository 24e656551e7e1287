"""Sessions in files: they continue as if never written; a damaged file is not used."""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import conformance.skeleton as conformance
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import Tiny

import mlxrun
from converters.gguf.reader import read_gguf
from mlxrun.engine.sequence import Session
from mlxrun.errors import CacheError
from mlxrun.kv_cache import storage
from mlxrun.kv_cache.attention import scaled
from mlxrun.kv_cache.dense import DenseCache
from mlxrun.kv_cache.formats import Quantized
from mlxrun.kv_cache.per_channel import PerChannel, PerChannelCache
from mlxrun.kv_cache.sliding_window import RotatingCache
from mlxrun.loader import load_model

OPTIONS: list[dict[str, Any]] = [
    {},
    {"window": 24, "keep": 3},
    {"cache_type_k": "q8/32", "cache_type_v": "q4/32"},
]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
MODEL = Tiny(heads=2, kv_heads=1, layers=2)
PROMPT = np.random.default_rng(0).integers(3, 128, 60).tolist()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODEL.write(tmp_path_factory.mktemp("model") / "x.gguf")


@pytest.fixture(scope="module")
def llm(path: Path) -> mlxrun.LLM:
    return mlxrun.load(path)


@pytest.fixture(scope="module")
def written(llm: mlxrun.LLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("saved") / "talk.cache"
    session = llm.session()
    llm.generate(PROMPT, session=session, **GREEDY)
    session.save(file)
    return file


def loaded(llm: mlxrun.LLM, file: Path, **options: Any) -> tuple[int, str]:
    """Tokens that a file restores, and the warning about it."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        session = llm.load_session(file, **options)
    assert len(said) == (not session.tokens)
    return len(session.tokens), str(said[0].message) if said else ""


def goes_on(source: Path, folder: Path, **options: Any) -> None:
    """A session that was saved and one that was not give the same, without reading again."""
    llm, file = mlxrun.load(source), folder / "talk.cache"
    session = llm.session(**options)
    completion = llm.generate(PROMPT, session=session, **GREEDY)
    session.save(file)
    cached = len(session.tokens)
    following = [*PROMPT, *completion.tokens, 5, 6, 7]
    wanted = llm.generate(following, session=session, **GREEDY)
    other = mlxrun.load(source)
    again = other.load_session(file)
    assert again.options == session.options
    got = other.generate(following, session=again, **GREEDY)
    assert got.tokens == wanted.tokens
    assert got.usage.cached_tokens == wanted.usage.cached_tokens == cached


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_saved_session_continues(path: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    goes_on(path, tmp_path, **options)


@pytest.mark.parametrize("name", ["deepseek2-lite", "gemma3-windows", "falcon-h1-500m"])
def test_every_kind_of_memory_can_be_saved(tmp_path: Path, name: str) -> None:
    source = conformance.read(name).write(tmp_path / "x.gguf")
    model: Any = load_model(read_gguf(source), dtype="float32").model
    session, other = (Session(model, fingerprint=lambda: "this one") for _ in range(2))
    model(mx.array([PROMPT]), session.cache)
    session.set_caches(session.cache, PROMPT)
    session.save(tmp_path / "talk.cache")
    read = storage.read(tmp_path / "talk.cache", "this one")
    read.restore(other.cache, lambda caches: model(mx.array([[0]]), caches))
    other.set_caches(other.cache, read.tokens)
    following = [*PROMPT, 5, 6, 7]
    assert other.rewind(other.common_len(following)) == len(PROMPT)
    rest = mx.array([following[len(PROMPT) :]])
    np.testing.assert_array_equal(model(rest, other.cache), model(rest, session.cache))


@settings(max_examples=150)
@given(data=st.data())
def test_any_changed_byte_makes_it_a_miss(llm: mlxrun.LLM, written: Path, data: Any) -> None:
    whole = written.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    inside = st.integers(0, header - 1) | st.integers(header, len(whole) - 1)
    place, bit = data.draw(inside), data.draw(st.integers(0, 7))
    damaged = bytearray(whole)
    damaged[place] ^= 1 << bit
    file = written.with_name("damaged")
    file.write_bytes(damaged)
    tokens, said = loaded(llm, file)
    assert tokens == 0
    assert "\n" not in said and ("is damaged" in said or "is no saved session" in said)


Damage = Callable[[str, mx.array], mx.array]
DAMAGES: dict[str, Damage] = {
    "heads": lambda _, x: mx.concatenate([x, x], axis=1),
    "width": lambda _, x: x[..., :-1],
    "dimensions": lambda _, x: x[0],
    "number of tokens": lambda _, x: x[:, :, :-1],
    "dtype": lambda _, x: x.astype(mx.float16 if x.dtype == mx.float32 else mx.float32),
    "of one array": lambda name, x: x[..., :-1] if name.endswith("1") else x,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "options", [*OPTIONS, {"cache_type_k": "q4c"}, {"attention": "blocks:4x16"}], ids=str
)
def test_arrays_that_do_not_fit_are_a_miss(
    llm: mlxrun.LLM, tmp_path: Path, options: dict[str, Any], damage: str
) -> None:
    """As another build might write them, with a checksum that is right."""
    file, session = tmp_path / "talk.cache", llm.session(**options)
    llm.generate(PROMPT, session=session, **GREEDY)
    session.save(file)
    assert session._fingerprint is not None
    read = storage.read(file, session._fingerprint())
    damaged = [{n: DAMAGES[damage](n, x) for n, x in part.items()} for part in read.parts]
    states = [
        s and s._replace(arrays={n: DAMAGES[damage](n, x) for n, x in s.arrays.items()})
        for s in read.states
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "read", lambda *_: read._replace(parts=damaged, states=states))
        assert "its arrays do not fit" in loaded(llm, file)[1]
    assert loaded(llm, file)[0] == len(PROMPT) + 5


@pytest.mark.parametrize("token", [-1, 1 << 20])
def test_tokens_outside_the_vocabulary_are_a_miss(
    llm: mlxrun.LLM, written: Path, monkeypatch: pytest.MonkeyPatch, token: int
) -> None:
    fingerprint = llm.session()._fingerprint
    assert fingerprint is not None
    read = storage.read(written, fingerprint())
    monkeypatch.setattr(storage, "read", lambda *_: read._replace(tokens=[token, *read.tokens[1:]]))
    assert "tokens that this model does not have" in loaded(llm, written)[1]


@pytest.mark.parametrize("size", [0, 5, 8, 100, 2000, -1])
def test_a_file_cut_short_is_a_miss(llm: mlxrun.LLM, written: Path, size: int) -> None:
    file = written.with_name("short")
    file.write_bytes(written.read_bytes()[:size])
    assert loaded(llm, file)[0] == 0


def test_a_file_of_another_kind_is_a_miss(llm: mlxrun.LLM, path: Path, tmp_path: Path) -> None:
    assert "No such file" in loaded(llm, tmp_path / "none")[1]
    assert "no saved session" in loaded(llm, path)[1]
    assert loaded(llm, tmp_path)[0] == 0
    os.mkfifo(tmp_path / "pipe")
    assert "no saved session" in loaded(llm, tmp_path / "pipe")[1]


@pytest.mark.parametrize("content", [b"precious", b"", b"\x40" + bytes(7) + b"{}" * 40])
def test_only_a_session_is_replaced(
    llm: mlxrun.LLM, tmp_path: Path, written: Path, content: bytes
) -> None:
    session, mine = llm.load_session(written), tmp_path / "mine.txt"
    mine.write_bytes(content)
    with pytest.raises(CacheError, match=r"mine\.txt was not replaced: it is no saved session"):
        session.save(mine)
    assert mine.read_bytes() == content and list(tmp_path.iterdir()) == [mine]
    mine.write_bytes(written.read_bytes()[:-1])  # a damaged one may be
    session.save(mine)
    assert mine.read_bytes() == written.read_bytes()


def test_a_directory_is_not_replaced(llm: mlxrun.LLM, tmp_path: Path, written: Path) -> None:
    with pytest.raises(CacheError, match=rf"cannot write {tmp_path}: it is a directory$"):
        llm.load_session(written).save(tmp_path)


def test_other_options_than_were_saved_are_a_miss(llm: mlxrun.LLM, written: Path) -> None:
    assert loaded(llm, written)[0] == len(PROMPT) + 5
    assert "other options" in loaded(llm, written, window=9)[1]
    assert "other options" in loaded(llm, written, cache_type_k="f16")[1]


def test_another_pattern_of_attention_than_was_saved_is_a_miss(
    llm: mlxrun.LLM, written: Path, tmp_path: Path
) -> None:
    """Prompts have the same K/V in dense and sparse caches, sampled tokens do not."""
    for pattern in ("strided:8/4", "blocks:4x16"):
        assert "other options" in loaded(llm, written, attention=pattern)[1]
    session, file = llm.session(attention="strided:8/4"), tmp_path / "sparse.cache"
    llm.generate(PROMPT, session=session, **GREEDY)
    session.save(file)
    assert "other options" in loaded(llm, file, attention="strided:16/4")[1]
    assert "other options" in loaded(llm, file, attention="dense")[1]
    assert loaded(llm, file, attention="strided:8/4")[0] == len(PROMPT) + 5
    assert loaded(llm, file)[0] == len(PROMPT) + 5


def test_options_that_come_to_the_same_are_a_hit(llm: mlxrun.LLM, written: Path) -> None:
    assert loaded(llm, written, attention="dense")[0] == len(PROMPT) + 5
    assert loaded(llm, written, keep=0)[0] == len(PROMPT) + 5


def test_the_same_model_in_another_place_is_the_same(
    written: Path, path: Path, tmp_path: Path
) -> None:
    moved = shutil.copy(path, tmp_path / "moved.gguf")
    assert loaded(mlxrun.load(moved), written)[0] == len(PROMPT) + 5


@pytest.mark.parametrize("change", ["weights", "template", "dtype"])
def test_another_model_is_a_miss(written: Path, tmp_path: Path, change: str) -> None:
    other = {
        "weights": Tiny(heads=2, kv_heads=1, layers=2, seed=1),
        "template": Tiny(heads=2, kv_heads=1, layers=2, template="{{ messages }}"),
        "dtype": MODEL,
    }[change]
    llm = mlxrun.load(
        other.write(tmp_path / "x.gguf"), dtype="bfloat16" if change == "dtype" else None
    )
    assert "another model, tokenizer or template" in loaded(llm, written)[1]


def test_one_changed_weight_of_a_directory_is_another_model(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    mlxrun.convert(path, folder)
    goes_on(folder, tmp_path)
    first = mlxrun.load(folder)
    session = first.session()
    first.generate(PROMPT, session=session, **GREEDY)
    session.save(tmp_path / "talk.cache")
    weights = folder / "model.safetensors"
    whole = bytearray(weights.read_bytes())
    whole[-1] ^= 1
    weights.write_bytes(whole)
    assert "another model" in loaded(mlxrun.load(folder), tmp_path / "talk.cache")[1]
    late = first.session()
    first.generate(PROMPT, session=late, **GREEDY)
    late.save(tmp_path / "late.cache")  # the fingerprint was known before the files changed
    assert loaded(mlxrun.load(folder), tmp_path / "late.cache")[0] == 0


def test_files_that_changed_since_they_were_loaded_tell_nothing(tmp_path: Path) -> None:
    source = MODEL.write(tmp_path / "x.gguf")
    llm = mlxrun.load(source)
    session = llm.session()
    llm.generate(PROMPT, session=session, **GREEDY)
    Tiny(heads=2, kv_heads=1, layers=2, seed=5).write(source)
    with pytest.raises(CacheError, match="has changed since it was loaded"):
        session.save(tmp_path / "talk.cache")


def test_a_failed_write_leaves_the_old_file(llm: mlxrun.LLM, written: Path, tmp_path: Path) -> None:
    before = hashlib.sha256(written.read_bytes()).hexdigest()
    with pytest.raises(CacheError, match="no tokens"):
        llm.session().save(written)
    session = llm.session()
    llm.generate(PROMPT, session=session, **GREEDY)
    with pytest.raises(CacheError, match="cannot write"):
        session.save(tmp_path / "no" / "folder")
    assert hashlib.sha256(written.read_bytes()).hexdigest() == before
    assert {file.name for file in written.parent.iterdir()} <= {"talk.cache", "damaged", "short"}


def test_a_file_of_version_1_continues() -> None:
    """Written before rings had slack and classes their names of today."""
    file = Path(__file__).with_name("session_version_1.safetensors")
    caches = [
        DenseCache(),
        DenseCache(Quantized(8, 32), Quantized(4, 32)),
        RotatingCache(6, keep=2),
        RotatingCache(100, keep=2),
        PerChannelCache(PerChannel(2, 32), Quantized(8, 32)),
    ]
    x = np.random.default_rng(0).standard_normal((1, 1, 70, 32)).astype(np.float32)
    tokens, more, op = mx.array(x), mx.array(x[:, :, 50:]), scaled(1.0, None, None)
    fresh = [cache.empty() for cache in caches]
    for cache in fresh:
        cache.attend(tokens, tokens, tokens, op)

    saved = storage.read(file, "a model")
    assert saved.tokens == list(range(70)) and saved.metadata == {"window": 6}
    saved.restore(caches, lambda given: [c.attend(*[tokens[:, :, :1]] * 3, op) for c in given])
    for n in (1, 3, 20):
        chunk = more[:, :, :n]
        for cache, expected in zip(caches, fresh, strict=True):
            got = cache.attend(chunk, chunk, chunk, op)
            wanted = expected.attend(chunk, chunk, chunk, op)
            np.testing.assert_allclose(np.array(got), np.array(wanted), atol=1e-5)
    with pytest.raises(CacheError, match="saved with another model"):
        storage.read(file, "another")
