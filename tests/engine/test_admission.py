"""Requests wait for memory rather than die for lack of it; what never fits is refused at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from patience import PATIENCE
from tiny_models import Tiny

import mlxrun
from mlxrun.config import CacheConfig
from mlxrun.engine.engine import Engine, prefill_budget
from mlxrun.engine.kv_budget import KVBudget
from mlxrun.errors import ContextLengthError, MemoryLimitError
from mlxrun.kv_cache.prefix_cache import PrefixCache
from mlxrun.memory import plan as source

PLAIN = CacheConfig()
NONE = PrefixCache(0)
OPTIONS = {"temperature": 0, "ignore_eos": True, "max_tokens": 200}


def budget(
    llm: mlxrun.LLM,
    config: CacheConfig,
    parallel: int | None,
    context: int | None = None,
    chunk: int | None = None,
) -> KVBudget:
    return KVBudget(
        llm.model, llm.config, llm.storage, config, NONE, parallel=parallel, context=context,
        most=1, chunk=chunk or prefill_budget(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> mlxrun.LLM:
    path = tmp_path_factory.mktemp("admission") / "m.gguf"
    return mlxrun.load(Tiny(hidden=128, heads=8, kv_heads=8, layers=4, vocab=300).write(path))


@pytest.fixture
def room_for(llm: mlxrun.LLM, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A machine in which two sequences of these requests fit, and not three."""
    room = {"bytes": source.room()}
    monkeypatch.setattr(source, "room", lambda: room["bytes"])
    monkeypatch.setattr(source, "_others", lambda ours: 0)
    offline = prefill_budget("batch")
    cost = budget(llm, PLAIN, 4).cost(205, PLAIN)
    low, high = 0, 1 << 28  # with the first there is too little, with the second too much
    while high - low > cost // 8:
        room["bytes"] = (low + high) // 2
        try:
            few = (budget(llm, PLAIN, 4, chunk=offline).memory or 0) < 2.5 * cost
        except MemoryLimitError:
            few = True
        low, high = (room["bytes"], high) if few else (low, room["bytes"])
    room |= {"bytes": high, "cost": cost}
    return room


def test_a_batch_takes_turns_where_not_all_fit(
    llm: mlxrun.LLM, room_for: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    most, step = 0, Engine.step

    def counted(self: Engine) -> None:
        nonlocal most
        step(self)
        scheduler = self.scheduler
        most = max(most, scheduler.num_running)
        assert scheduler.used <= (scheduler.memory or 0)

    monkeypatch.setattr(Engine, "step", counted)
    prompts = ["tea", "one", "two", "abc", "xyz"]
    got = llm.batch(prompts, parallel=4, prefix_bytes=0, **OPTIONS)
    assert 1 <= most < 4
    monkeypatch.undo()
    assert [r.tokens for r in got] == [llm.generate(p, **OPTIONS).tokens for p in prompts]


def test_requests_that_grow_out_of_memory_are_preempted(
    llm: mlxrun.LLM, room_for: dict[str, int]
) -> None:
    """Their prompts fit, as a request is not charged for the tokens that it may sample at most."""
    long = OPTIONS | {"max_tokens": 600}
    room_for["bytes"] += 4 * room_for["cost"]
    with llm.engine(parallel=8, prefix_bytes=0) as engine:
        handles = [engine.submit([5 + i, 6, 7], **long) for i in range(8)]
        got = [handle.result(PATIENCE).tokens for handle in handles]
        assert engine.figures.preempted > 0
    assert got == [llm.generate([5 + i, 6, 7], **long).tokens for i in range(8)]


def test_requests_that_never_fit_are_refused_with_both_numbers(
    llm: mlxrun.LLM, room_for: dict[str, int]
) -> None:
    prompt = [5] * 1500
    with pytest.raises(MemoryLimitError) as caught:
        llm.batch(["tea", prompt], parallel=4, prefix_bytes=0, **OPTIONS)
    assert caught.value.needed > caught.value.available > room_for["cost"]
    with llm.engine(parallel=4, prefix_bytes=0) as engine:
        with pytest.raises(MemoryLimitError):
            engine.submit(prompt, **OPTIONS)
        assert len(engine.submit("tea", **OPTIONS).result(PATIENCE).tokens) == 200


def test_no_room_for_anything_says_so(llm: mlxrun.LLM, room_for: dict[str, int]) -> None:
    room_for["bytes"] = 1000
    with pytest.raises(MemoryLimitError, match=r"0\.0 MB are available"):
        llm.batch(["tea"])


def test_fewer_sequences_may_be_longer(llm: mlxrun.LLM, room_for: dict[str, int]) -> None:
    room_for["bytes"] += 12 * room_for["cost"]
    contexts = [budget(llm, PLAIN, parallel).room.context for parallel in (2, 4, 8)]
    assert contexts[0] > contexts[1] > contexts[2] > 0


def test_sizes_that_are_not_given_are_chosen(llm: mlxrun.LLM, room_for: dict[str, int]) -> None:
    room_for["bytes"] += 12 * room_for["cost"]
    assert llm.room(context=600, prefix_bytes=0).context == 600
    with llm.engine(context=600, prefix_bytes=0) as engine:
        many = engine.figures.parallel
        assert 1 < many < 16
        assert engine.figures.context == 600
    with llm.engine(parallel=many, prefix_bytes=0) as engine:
        assert engine.figures.context >= 600
    with llm.engine(parallel=many + 1, prefix_bytes=0) as engine:
        assert engine.figures.context < 600
    with pytest.raises(MemoryLimitError) as caught:
        llm.engine(parallel=many + 1, context=600, prefix_bytes=0)
    assert caught.value.needed > caught.value.available > 0
    with pytest.raises(MemoryLimitError):
        llm.batch(["tea"], parallel=many + 1, context=600, prefix_bytes=0)


def test_a_context_that_is_given_bounds_each_request(llm: mlxrun.LLM) -> None:
    options = {"temperature": 0, "ignore_eos": True, "max_tokens": None}
    (short,) = llm.batch([[5] * 30], context=40, **options)
    assert len(short.tokens) == 10
    assert short.finish_reason == "length"
    with pytest.raises(ContextLengthError, match="holds 40"):
        llm.batch([[5] * 40], context=40)
    with llm.engine(context=40) as engine, pytest.raises(ContextLengthError):
        engine.submit([5] * 41)


def test_memory_of_other_models_is_no_room(
    llm: mlxrun.LLM, room_for: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    room_for["bytes"] += 1 << 23
    before = budget(llm, PLAIN, 4, context=200).memory or 0
    private = llm.model.nbytes - llm.model.mapped
    monkeypatch.setattr(source, "_others", lambda ours: 1000 if ours == private else 0)
    assert budget(llm, PLAIN, 4, context=200).memory == before - 1000


def test_a_type_of_cache_costs_its_own_bytes(llm: mlxrun.LLM) -> None:
    own = budget(llm, PLAIN, 4)
    plain = own.cost(400, PLAIN)
    assert own.cost(400, CacheConfig(cache_type_k="q8/32", cache_type_v="q4/32")) < plain
    assert own.cost(5200, CacheConfig(window=64, keep=4)) < own.cost(5200, PLAIN)


def test_scratch_beyond_the_reserve_costs_as_well(llm: mlxrun.LLM) -> None:
    """Room is set aside for passes of the usual kind; another's may take more, not less."""
    windowed = CacheConfig(window=64, keep=4)
    plain, sparing = (budget(llm, kind, 4) for kind in (PLAIN, windowed))
    assert sparing.cost(1000, PLAIN) > plain.cost(1000, PLAIN)
    assert plain.cost(1000, windowed) == sparing.cost(1000, windowed)


def test_without_a_limit_everything_is_admitted(
    llm: mlxrun.LLM, room_for: dict[str, int], tmp_path: Path
) -> None:
    room_for["bytes"] = 0  # the system does not say
    unlimited = budget(llm, PLAIN, 4)
    assert unlimited.memory is None
    assert unlimited.room == (4, llm.context_length)


@pytest.mark.parametrize(
    ("needed", "said"),
    [(98_100_000, "98.1 MB"), (24_000_000_000, "24.0 GB"), (6936716921400000, "6936.7 TB")],
)
def test_sizes_of_an_error_are_for_people(needed: int, said: str) -> None:
    found = str(MemoryLimitError(needed, 98_000_000, "it"))
    assert found.startswith(f"it needs {said}, and 98.0 MB are available")


def test_threads_that_generate_at_once_stay_within_memory(
    llm: mlxrun.LLM, room_for: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request alone always runs; those besides it wait for memory."""
    prompts = ["tea", "one", "two", "abc", "xyz", "sea"]
    alone = [llm.generate(prompt, **OPTIONS).tokens for prompt in prompts]
    monkeypatch.setattr(llm, "_direct", None)
    monkeypatch.setattr(llm, "_prefix_cache", PrefixCache(0))
    engine = llm.direct_engine
    spare = budget(llm, PLAIN, engine.config.parallel).memory or 0
    room_for["bytes"] += int(2.5 * room_for["cost"]) - spare
    most, step = 0, engine.step

    def counted() -> None:
        nonlocal most
        step()
        most = max(most, engine.scheduler.num_running)
        if engine.scheduler.num_running > 1:
            assert engine.scheduler.used <= (engine.scheduler.memory or 0)

    monkeypatch.setattr(engine, "step", counted)
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda prompt: llm.generate(prompt, **OPTIONS).tokens, prompts))
    assert together == alone
    assert 1 < most < len(prompts)
    assert engine.num_steps < sum(map(len, alone))
