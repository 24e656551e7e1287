"""Rows that begin alike hold their beginning once, and get the tokens that each gets alone."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_serving import PARAMS, VOCABULARY, Ask, Counted, alone, model_of, play
from test_sharing import submit
from tiny_models import Tiny

from converters.gguf.reader import read_gguf
from mlxrun.generation import sharing, stepping
from mlxrun.generation.batch import Batch
from mlxrun.generation.sampling import Sampler
from mlxrun.generation.serving import Job, Service
from mlxrun.kv_cache.dense import BUCKET
from mlxrun.kv_cache.formats import PLAIN
from mlxrun.kv_cache.prefix_cache import PrefixCache, SharedPrefixCache
from mlxrun.loader import load_model
from mlxrun.outputs import Request

#: Grouped queries, bounded scores, sinks beside windows, latents, falling scores, windows, a state.
FAMILIES = (
    "llama-mqa",
    "gemma2-caps",
    "gpt-oss-small",
    "deepseek2-lite",
    "bloom-560m",
    "gemma3-windows",
    "falcon-h1-500m",
)
FORMATS: list[dict[str, Any]] = [
    {"keys": "f32", "values": "f16"},
    {"keys": "q8", "values": "q8"},
    {"keys": "q4", "values": "q4"},
    {"keys": "q8", "values": "q4"},
]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let short beginnings be shared."""
    monkeypatch.setattr(sharing, "SHARED", 12)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = Tiny(hidden=64, heads=2, kv_heads=1, ffn=48, vocab=VOCABULARY + 160).write(
        tmp_path_factory.mktemp("tiny") / "x.gguf"
    )
    return load_model(read_gguf(path), dtype="float32").model


def asks(count: int, common: int, seed: int = 0) -> list[Ask]:
    """Requests whose prompts have their first tokens in common."""
    rng = np.random.default_rng(seed)
    base = rng.integers(3, VOCABULARY, common).tolist()
    kinds = ("greedy", "seeded", "mixed")
    return [
        Ask(
            [*base, *rng.integers(3, VOCABULARY, rng.integers(1, 12)).tolist()],
            int(rng.integers(6, 14)),
            PARAMS[kinds[i % 3]](i),
        )
        for i in range(count)
    ]


def branches(batch: Batch) -> list[SharedPrefixCache]:
    """The caches of rows that share a beginning."""
    caches = [cache for block in batch._blocks for cache in block.caches]
    return [cache for cache in caches if isinstance(cache, SharedPrefixCache)]


def serve(model: Any, given: list[Ask], rows: int = 4, **formats: Any) -> int:
    """Serve requests together; the most rows that ever shared a beginning."""
    service = Service(model, rows=rows, prefixes=PrefixCache(1 << 30, min_prefix_len=2))
    for ask in given:
        submit(service, model, ask, **formats)
    most = 0
    while service.busy:
        service.step()
        each = [len(cache.offsets) for cache in branches(service.batch)]
        most = max([most, *each])
    return most


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(tmp_path: Path, name: str) -> None:
    model = model_of(name, tmp_path)
    wanted = [alone(model, ask) for ask in asks(5, 40)]
    given = asks(5, 40)
    shared = serve(model, given)
    assert [ask.tokens for ask in given] == wanted
    assert shared > 1 or not model.joint


@pytest.mark.parametrize("name", ["gpt-oss-small", "deepseek2-lite", "gemma3-windows"])
def test_recorded_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A recording reads what rows share, and does not hold on to it."""
    model = model_of(name, tmp_path)
    wanted = [alone(model, ask) for ask in asks(5, 40)]
    monkeypatch.setattr(stepping, "PATIENCE", 1)
    given = asks(5, 40)
    prefixes = PrefixCache(1 << 30, min_prefix_len=2)
    service = Service(model, rows=4, prefixes=prefixes)
    for ask in given:
        submit(service, model, ask)
    beginnings: weakref.WeakSet[Any] = weakref.WeakSet()
    seen = 0
    while service.busy:
        service.step()
        beginnings.update(cache.prefix for cache in branches(service.batch))
        seen = max(seen, len(beginnings))
    assert [ask.tokens for ask in given] == wanted
    assert service.batch._stepper.recorded
    assert seen
    prefixes.clear()
    gc.collect()
    assert not beginnings


@pytest.mark.parametrize("formats", FORMATS, ids=str)
def test_every_format(tiny: Any, formats: dict[str, Any]) -> None:
    wanted, given = asks(5, 40), asks(5, 40)
    for ask in wanted:  # one after the other: nobody to share with
        assert serve(tiny, [ask], **formats) == 0
    assert serve(tiny, given, **formats) > 1
    assert [ask.tokens for ask in given] == [ask.tokens for ask in wanted]
    assert [len(ask.tokens) for ask in given] == [ask.limit for ask in given]


@given(seed=st.integers(0, 10**6), budget=st.sampled_from([0, 30_000, 60_000, 10**9]))
@settings(max_examples=4)
def test_joins_leaves_cancellations_and_evictions_at_random(
    tiny: Any, seed: int, budget: int
) -> None:
    rng = np.random.default_rng(seed)
    groups = [asks(5, int(rng.integers(10, 90)), seed + i) for i in range(3)]
    wanted = {tuple(ask.prompt): alone(tiny, ask) for group in groups for ask in group}
    coming = [group[i] for i in rng.permutation(5) for group in groups]
    prefixes = PrefixCache(budget, min_prefix_len=int(rng.integers(1, 20)))
    service = Service(tiny, rows=int(rng.integers(2, 6)), prefixes=prefixes)
    running: dict[int, Ask] = {}
    while coming or service.busy:
        if coming and rng.random() < 0.4:
            ask = coming.pop()
            running[submit(service, tiny, ask)[0]] = ask
        elif running and rng.random() < 0.05:
            service.cancel(int(rng.choice(list(running))))
        elif rng.random() < 0.05:
            prefixes.clear()  # whoever uses something keeps it
        else:
            service.step()
        assert prefixes.nbytes <= budget
    for ask in running.values():
        expected = wanted[tuple(ask.prompt)]
        assert ask.tokens == expected[: len(ask.tokens) if ask.reason == "cancelled" else None]
    prefixes.clear()
    assert prefixes.nbytes == 0, "somebody still uses something"


def test_rows_take_one_copy_of_their_beginning(tiny: Any) -> None:
    common, rows = 1000, 20
    given = [Ask(ask.prompt, 40, ask.params) for ask in asks(rows, common)]
    service = Service(tiny, rows=rows, beside=512, prefixes=PrefixCache(1 << 30))
    for ask in given:
        submit(service, tiny, ask)
    token = 2 * sum(form.token_bytes(1, 32, mx.float32) for form in (PLAIN, PLAIN))  # two layers
    together = 0
    while service.busy:
        service.step()
        blocks = list(service.batch._blocks)
        if sum(len(block.rows) for block in blocks) == rows:
            together += 1
            shared = {cache.prefix for cache in branches(service.batch)}
            assert [beginning.nbytes for beginning in shared] == [common * token]
            # Besides, each row has what it was asked beyond the beginning, in a bucket.
            assert service.batch.nbytes == (common + rows * BUCKET) * token
    assert together


def test_deterministic_rows_copy(tiny: Any) -> None:
    given = asks(4, 2 * sharing.EVERY)
    service = Service(tiny, rows=4, deterministic=True, prefixes=PrefixCache(1 << 30))
    replies = [submit(service, tiny, ask)[1] for ask in given]
    while service.busy:
        service.step()
        caches = [cache for _, live in service._jobs.values() for cache in live.cache]
        assert not any(isinstance(cache, SharedPrefixCache) for cache in caches)
    assert sum(reply.cached for reply in replies) > 0


def test_what_is_shared_goes_with_the_last_that_uses_it(tiny: Any) -> None:
    prefixes = PrefixCache(1 << 30, min_prefix_len=2)
    service = Service(tiny, rows=4, prefixes=prefixes)
    for ask in asks(5, 40):
        submit(service, tiny, ask)
    play(service)
    submit(service, tiny, Ask([5, 6, 7], 2, PARAMS["greedy"](0)))
    play(service)  # an empty block goes before the next step
    assert not prefixes.shared_lens(asks(1, 40)[0].prompt, tiny.make_cache())


@given(st.lists(st.integers(0, 60)), st.lists(st.integers(0, 60)))
def test_what_saves_about_the_most_is_held_together(common: list[int], held: list[int]) -> None:
    def saved(length: int) -> int:
        return length * sum(n >= length for n in common)

    best = max((saved(n) for n in common if n >= sharing.SHARED), default=0)
    chosen = sharing.together(common, held)
    assert (chosen == 0) == (best == 0)
    assert saved(chosen) >= sharing.NEARLY * best
    good = {n for n in held if n >= sharing.SHARED and best and saved(n) >= sharing.NEARLY * best}
    assert not good or chosen in good, "others hold nearly as much already"


def test_more_that_share_than_that_copy_fit_into_memory(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, count = 512, 8  # two layers of keys and values, 32 wide
    given = [Ask(ask.prompt, 30, ask.params) for ask in asks(count, 900)]
    cost = 1024 * token
    live = {}
    for most in (sharing.SHARED, 10**6):
        monkeypatch.setattr(sharing, "SHARED", most)
        service = Service(
            tiny, rows=count, memory=3 * cost, beside=512, prefixes=PrefixCache(1 << 30)
        )
        for ask in given:
            sampler = Sampler(ask.params, VOCABULARY, context_tokens=ask.prompt)
            request, reply = Request(ask.prompt, ask.params, ask.limit), Counted(ask.limit)
            job = Job(request, sampler, reply, ask.limit, tiny.make_cache(), 0, ask.got.append)  # type: ignore[arg-type]
            service.submit(job, cost=cost)
        live[most] = 0
        while service.busy:
            service.step()
            assert service.scheduler.used <= 3 * cost
            if not any(None in block.rows for block in service.batch._blocks):
                assert service.batch.nbytes <= service.scheduler.used
            live[most] = max(live[most], service.scheduler.live)
        assert service.scheduler.used == 0
    assert live[12] > live[10**6] == 3
