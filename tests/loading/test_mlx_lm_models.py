"""Model types that only mlx-lm defines: the same logits as mlx-lm's, through our engine."""

from __future__ import annotations

import gc
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from cache_configs import caching
from mlx_lm_models import CONFIGS, save, stock, stock_logits
from tiny_models import nmse

import mlxrun
from mlxrun.errors import CacheError
from mlxrun.loader import load_model, open_model
from mlxrun.memory.plan import plan_source
from mlxrun.models.families import model_config
from mlxrun.models.mlx_lm import MLXLMModel, named_arrays
from mlxrun.models.transformer import Transformer
from mlxrun.weights.parameters import Parameters

TOKENS = [int(t) for t in np.random.default_rng(3).integers(3, 288, 40)]
# Keys and values; windows of 16; a state; a state and keys and values in each layer.
KINDS = ("helium", "recurrent_gemma", "mamba2", "falcon_h1")
GREEDY = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module", params=KINDS)
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> mlxrun.LLM:
    config = CONFIGS[request.param]
    path = save(tmp_path_factory.mktemp(request.param), config, stock(config))
    return mlxrun.load(path)


def passes(model: object, memory: list[object], sizes: list[int]) -> np.ndarray:
    """Logits (T, V) of the tokens in passes of these sizes."""
    parts, start = [], 0
    for size in sizes:
        parts.append(model(mx.array([TOKENS[start : start + size]]), memory)[0])
        start += size
    return np.array(mx.concatenate(parts).astype(mx.float32))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_mlx_lms_in_one_pass_in_chunks_and_token_by_token(
    tmp_path: Path, name: str
) -> None:
    stock_model = stock(CONFIGS[name])
    model = load_model(save(tmp_path, CONFIGS[name], stock_model, tokenizer=False)).model
    expected = stock_logits(stock_model, [TOKENS])
    assert np.array_equal(passes(model, model.make_cache(), [40]), expected)
    for sizes in ([7] * 5 + [5], [1] * 40):
        assert nmse(passes(model, model.make_cache(), sizes), expected) < 1e-8
    last = model(mx.array([TOKENS]), model.make_cache(), last_only=True)
    assert last.shape == (1, 1, 288)
    assert nmse(np.array(last[0]), expected[-1:]) < 1e-8


def test_a_conversation_gives_the_tokens_of_a_fresh_session(llm: mlxrun.LLM) -> None:
    session, prompt = llm.session(), TOKENS[:11]
    for turn in range(3):
        options = {**GREEDY, "max_tokens": 70}
        completion = llm.generate(prompt, session=session, **options)
        assert completion.tokens == llm.generate(prompt, **options).tokens
        assert turn == 0 or completion.usage.cached_tokens == len(prompt) - 8
        prompt = [*prompt, *completion.tokens, *TOKENS[turn : turn + 7]]


def test_a_stream_that_was_closed_leaves_the_tokens_it_yielded(llm: mlxrun.LLM) -> None:
    session, prompt = llm.session(), TOKENS[:20]
    stream = llm.stream(prompt, session=session, max_tokens=50, **GREEDY)
    seen = [token for _ in range(5) for token in next(stream).tokens]
    stream.close()
    assert session.tokens == prompt + seen
    assert session.cache[0].offset == 25
    # The last token gives way to another one: one step back, and no further.
    prompt = [*prompt, *seen[:-1], 7]
    completion = llm.generate(prompt, session=session, max_tokens=10, **GREEDY)
    assert completion.tokens == llm.generate(prompt, max_tokens=10, **GREEDY).tokens
    assert completion.usage.cached_tokens == 24


def test_going_back_over_one_step_is_exact_and_further_back_starts_afresh(llm: mlxrun.LLM) -> None:
    model = llm.model
    (memory,) = model.make_cache()
    model(mx.array([TOKENS[:20]]), [memory])
    for _ in range(25):  # past every window
        model(mx.array([[5]]), [memory])
    expected = np.array(model(mx.array([[9]]), [memory.fork()]))
    memory.truncate(0, 0)
    model(mx.array([[8]]), [memory])
    memory.truncate(0, 1)
    assert memory.offset == 45
    assert np.array_equal(np.array(model(mx.array([[9]]), [memory])), expected)
    if llm.model.summary.family == "helium":
        memory.truncate(0, 30)
    else:
        with pytest.raises(CacheError, match="go back 30 tokens"):
            memory.truncate(0, 30)
    with pytest.raises(CacheError, match="cannot truncate"):
        memory.truncate(0, 1000)


def test_forks_go_their_own_ways(llm: mlxrun.LLM) -> None:
    session = llm.session()
    llm.generate(TOKENS[:20], session=session, max_tokens=12, **GREEDY)
    fork = session.fork()
    assert fork.tokens == session.tokens
    ways = [(session, [*session.tokens, 5]), (fork, [*session.tokens, 9, 11])]
    streams = [llm.stream(prompt, session=own, max_tokens=30, **GREEDY) for own, prompt in ways]
    completions: list[list[int]] = [[], []]
    for chunks in zip(*streams, strict=True):  # interleaved
        for completion, chunk in zip(completions, chunks, strict=True):
            completion.extend(chunk.tokens)
    for (_, prompt), completion in zip(ways, completions, strict=True):
        assert completion == llm.generate(prompt, max_tokens=30, **GREEDY).tokens


def test_an_interrupt_in_a_pass_does_no_harm(
    llm: mlxrun.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, prompt = llm.session(), TOKENS[:9]
    stream = llm.stream(prompt, session=session, max_tokens=50, **GREEDY)
    for _ in range(3):
        next(stream)
    layer = type(llm.model.module.layers[-1])
    with monkeypatch.context() as patch:
        patch.setattr(layer, "__call__", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    prompt = [*session.tokens, 4]
    completion = llm.generate(prompt, session=session, max_tokens=10, **GREEDY)
    assert completion.tokens == llm.generate(prompt, max_tokens=10, **GREEDY).tokens
    with monkeypatch.context() as patch:
        patch.setattr(layer, "__call__", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([*prompt, 3, 4, 5], session=session)
    completion = llm.generate([*prompt, 3, 4], session=session, max_tokens=10, **GREEDY)
    assert completion.tokens == llm.generate([*prompt, 3, 4], max_tokens=10, **GREEDY).tokens


def _interrupted(*args: object, **options: object) -> None:
    raise KeyboardInterrupt


def test_a_session_knows_its_size(llm: mlxrun.LLM) -> None:
    session = llm.session()
    assert session.nbytes == 0
    llm.generate(TOKENS, session=session, max_tokens=3)
    mx.synchronize()
    gc.collect()
    size, before = session.nbytes, mx.get_active_memory()
    del session
    gc.collect()
    # A slice of what a step computed holds on to all of it, a token more than is kept; there are
    # some small arrays besides.
    assert 0 < size <= before - mx.get_active_memory() <= 1.5 * size + 10_000


def test_states_do_not_keep_the_arrays_of_a_prompt_alive(llm: mlxrun.LLM) -> None:
    mx.eval(llm.model(mx.zeros((1, 1), mx.int32), llm.model.make_cache()))  # what classes keep
    gc.collect()
    before = mx.get_active_memory()
    memory = llm.model.make_cache()
    mx.eval(llm.model(mx.zeros((1, 1000), mx.int32), memory), memory[0].state)
    gc.collect()
    assert mx.get_active_memory() - before <= memory[0].nbytes + 20_000


@pytest.mark.parametrize("name", ["mamba", "mamba2", "rwkv7"])
def test_a_prompt_takes_the_memory_of_a_few_layers(tmp_path: Path, name: str) -> None:
    def peak(layers: int) -> int:
        config = CONFIGS[name] | {"num_hidden_layers": layers}
        path = save(tmp_path / str(layers), config, stock(config), tokenizer=False)
        model = load_model(path, dtype="float32").model
        gc.collect()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        memory = model.make_cache()
        mx.eval(model(mx.zeros((1, 400), mx.int32), memory, last_only=True), memory[0].state)
        return mx.get_peak_memory() - before - memory[0].nbytes

    assert peak(16) < 2 * peak(4)


@pytest.mark.parametrize(("window", "keep"), [(8, 0), (8, 3), (1, 0), (5, 1), (100, 4)])
def test_windows_evict_as_our_transformers_do(window: int, keep: int) -> None:
    config = CONFIGS["helium"] | {"model_type": "llama"}
    module = stock(config)
    theirs = MLXLMModel(module, config, mx.float32)
    arrays = named_arrays(module)
    ours = Transformer(model_config(config), Parameters(arrays, {}, mx.float32))
    expected = passes(ours, ours.make_cache(caching(window=window, keep=keep)), [1] * 40)
    for sizes in ([40], [7] * 5 + [5], [20, 1, 1, 9, 1, 1, 7], [1] * 30 + [3, 1, 6]):
        found = passes(theirs, theirs.make_cache(caching(window=window, keep=keep)), sizes)
        assert nmse(found, expected) < 1e-8


def test_a_window_bounds_the_cache(llm: mlxrun.LLM) -> None:
    session = llm.session(window=12, keep=2)
    for _ in range(3):
        llm.generate([*session.tokens, *TOKENS], session=session, max_tokens=20, **GREEDY)
    assert len(session.tokens) > 150
    assert all(
        entry.keys.shape[2] <= 14 + 40
        for entry in session.cache[0].entries
        if hasattr(entry, "keys")
    )


def test_models_that_cannot_evict_are_refused(tmp_path: Path) -> None:
    config = CONFIGS["llama4"]
    model = load_model(save(tmp_path, config, stock(config), tokenizer=False)).model
    with pytest.raises(CacheError, match="ChunkedKVCache, which cannot evict all but 8 tokens"):
        model.make_cache(caching(window=8))
    memory = model.make_cache(caching(window=20))
    assert passes(model, memory, [30, 1, 9]).shape == (40, 288)


def test_types_of_caches_are_refused(llm: mlxrun.LLM) -> None:
    for types in ({"cache_type_k": "q8"}, {"cache_type_v": "f16"}):
        with pytest.raises(CacheError, match="stores keys and values as they come"):
            llm.session(**types)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    "name", ["falcon_h1", "gemma3n", "helium", "mamba", "mamba2", "plamo2", "qwen3_5", "rwkv7"]
)
def test_the_planned_bytes_of_a_sequence_are_the_allocated_ones(
    tmp_path: Path, name: str, dtype: str
) -> None:
    path = save(tmp_path, CONFIGS[name], stock(CONFIGS[name]), tokenizer=False)
    model = load_model(path, dtype=dtype).model
    memory = model.make_cache()
    for tokens in ([TOKENS[:30]], [[5]], [[6]]):
        mx.eval(model(mx.array(tokens), memory))
    source = open_model(path)
    plan = plan_source(source, source.storage(dtype=dtype))
    assert plan.footprint.stored(32) == sum(part.nbytes for part in memory)
