"""ModelCost of models against naive counting: tensors of a file, arrays of a loaded model."""

from __future__ import annotations

import re
from dataclasses import replace
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from cache_configs import caching
from conformance.skeleton import Skeleton, names, read
from mlx.nn import Embedding, Linear, Module
from mlx_lm_models import CONFIGS, save, stock
from tiny_models import Tiny

import mlxrun
from converters.gguf.reader import read_gguf
from mlxrun.analysis.costs import decode_cost
from mlxrun.analysis.model_cost import mlx_lm_cost, model_cost, weight_cost
from mlxrun.kv_cache.factory import read_bytes
from mlxrun.loader import definition, load_model, open_model
from mlxrun.model import WeightStorage
from mlxrun.models.config import ModelConfig
from mlxrun.models.families import FAMILIES, model_config
from mlxrun.models.mlx_lm import MLXLMClasses, named_arrays

# A table that is only looked up, the output matrix, and tensors that are no matrices.
APART = re.compile(r"token_embd|position_embd|^output\.weight|norm|\.bias$")
# Modules of mlx-lm's classes.
SWITCHED = re.compile(r"\bswitch_mlp\.|\bfeed_forward\.experts\.")
TABLE = re.compile(r"\b(embed_tokens|embeddings)\.weight$")
LAYER = re.compile(r"blk\.(\d+)\.")


def opened_storage(source: Path, **options: Any) -> tuple[dict[str, Any], WeightStorage]:
    opened = open_model(source)
    return opened.config, opened.storage(**options)


def multiplied(skeleton: Skeleton, layers: int) -> int:
    """Weights that multiply one token, by the shapes of the tensors of a file."""
    used, count = (skeleton.keys.get(f"expert{end}", 1) for end in ("_used_count", "_count"))
    total = 0
    for name, (_, shape) in skeleton.shapes().items():
        layer = LAYER.match(name)
        beyond = layer is not None and int(layer[1]) >= layers
        if APART.search(name) or beyond or (len(shape) < 2 and "gate_inp_shexp" not in name):
            continue
        total += prod(shape) * used // count if "_exps" in name else prod(shape)
    return total


def test_operations_are_those_of_the_tensors_of_every_family(tmp_path: Path) -> None:
    seen = set()
    for name in names():
        skeleton = read(name)
        config, storage = opened_storage(skeleton.write(tmp_path / "x.gguf"))
        if config["model_type"] not in FAMILIES:
            continue
        seen.add(config["model_type"])
        model = model_config(dict(config))
        counts = model_cost(config, storage)
        depth = len(model.layers)
        assert counts.active == multiplied(skeleton, depth), name
        assert counts.head == model.vocab_size * model.hidden_size
    assert len(seen) > 25


@pytest.mark.parametrize(
    "name",
    [
        "llama-mqa", "gemma2-caps", "gpt-oss-small", "deepseek2-lite", "deepseek2-flash",
        "mixtral-8x", "qwen2moe-gqa", "phi2-turning", "gpt2-small", "granitemoe-ten",
    ],
)  # fmt: skip
def test_bytes_are_those_of_the_arrays_in_memory(name: str, tmp_path: Path) -> None:
    gguf = read_gguf(read(name).write(tmp_path / "x.gguf"))
    loaded = load_model(gguf)
    config, storage = opened_storage(gguf)
    before, after = (
        model_cost(config, storage).weights,
        weight_cost(model_config(loaded.config), loaded.model.module_bytes),
    )
    assert before == after
    assert after.total == loaded.model.nbytes == sum(loaded.model.module_bytes.values())
    routed = sum(each.nbytes for each in after.experts)
    experts = {
        n: size
        for n, size in loaded.model.module_bytes.items()
        if re.search(r"\b(switch_mlp|experts)\b", n)
    }
    assert routed == sum(experts.values())
    assert (routed > 0) == bool(gguf.key("expert_count", 0))


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "F16"])
@pytest.mark.parametrize("tied", [False, True])
def test_packed_weights_count_by_their_stored_bits(tmp_path: Path, kind: str, tied: bool) -> None:
    tiny = Tiny(kinds={"*": kind}, tied=tied, layers=1)
    path = tiny.write(tmp_path / "m.gguf")
    config, storage = opened_storage(path, dtype="float16")
    counts = model_cost(config, storage)
    bits = {"Q4_0": 4 + 2 * 16 / 32, "Q8_0": 8 + 2 * 16 / 32, "F16": 16}[kind]
    matrix = tiny.vocab * tiny.hidden * bits / 8
    assert counts.weights.head == matrix
    assert counts.weights.row == matrix / tiny.vocab
    assert counts.weights.table == (0 if tied else matrix)
    norms = 3 * tiny.hidden * 2
    assert counts.active is not None
    assert counts.weights.always == counts.active * bits / 8 + norms
    mlxrun.convert(path, tmp_path / "converted")
    directory = model_cost(*opened_storage(tmp_path / "converted", dtype="float16"))
    assert directory.weights == counts.weights
    loaded = mlxrun.load(tmp_path / "converted", dtype="float16")
    assert weight_cost(model_config(loaded.config), loaded.model.module_bytes) == counts.weights


def test_experts_of_a_converted_directory(tmp_path: Path) -> None:
    path = read("qwen3moe-one").write(tmp_path / "x.gguf")
    mlxrun.convert(path, tmp_path / "converted")
    of_file, of_directory = (
        model_cost(*opened_storage(source, dtype="float16"))
        for source in (path, tmp_path / "converted")
    )
    assert of_directory == of_file
    assert of_file.weights.experts


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K", "F16"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_packed_weights_of_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: str
) -> None:
    """Scales of half precision stay as they are in float32: products widen them."""
    monkeypatch.setenv("MLXRUN_PLAIN_SHARE", "0")
    mlxrun.convert(
        Tiny(kinds={"*": kind}, hidden=256, ffn=256).write(tmp_path / "m.gguf"), tmp_path / "m"
    )
    _, storage = opened_storage(tmp_path / "m", dtype=dtype)
    loaded = mlxrun.load(tmp_path / "m", dtype=dtype).model
    assert storage.nbytes == loaded.nbytes


def test_biases_that_a_file_leaves_out(tmp_path: Path) -> None:
    """A bias of zeros is made where its neighbors have one."""
    path = Tiny(biases=("attn_q", "attn_k", "attn_v")).write(tmp_path / "m.gguf")
    assert opened_storage(path)[1].nbytes == mlxrun.load(path).model.nbytes


@pytest.mark.parametrize("types", [(None, None), ("f16", "q8"), ("q8", "q4")], ids=str)
@pytest.mark.parametrize("window", [None, 200])
def test_keys_and_values_are_as_caches_store_them(
    tmp_path: Path, types: tuple[str | None, str | None], window: int | None
) -> None:
    llm = mlxrun.load(Tiny(head_dim=32).write(tmp_path / "m.gguf"))
    cache_config = caching(window, 0, *types)
    storage = WeightStorage(llm.model.nbytes, "float32", False, "", llm.model.module_bytes)
    counts = model_cost(llm.config, storage, cache_config)
    caches = llm.model.make_cache(cache_config)
    llm.model(mx.zeros((1, 256), mx.int32), caches, last_only=True)  # a capacity: all slots used
    stored = sum(cache.nbytes for cache in caches)
    work = decode_cost(counts, context=255)
    assert work.cache_read == stored
    assert work.cache_written == sum(layer.token for layer in counts.layers)


def test_keys_by_channel_are_no_more_than_plain_ones(tmp_path: Path) -> None:
    """Bounds from below: the ring of keys that wait to be packed holds no more than there are."""
    config, storage = opened_storage(Tiny(head_dim=32).write(tmp_path / "m.gguf"))
    plain, packed = (
        model_cost(config, storage, caching(None, 0, keys, None)) for keys in (None, "q4c")
    )
    for context in (0, 1, 31, 200, 900):
        assert decode_cost(packed, context).cache_read <= decode_cost(plain, context).cache_read


@pytest.mark.parametrize(
    "attention", [None, "window:64+4", "strided:64/8", "blocks:4x16", "blocks:32x64"]
)
@pytest.mark.parametrize("types", [(None, None), ("q8", "q4")], ids=str)
def test_patterns_read_as_much_as_sessions_report(
    tmp_path: Path, types: tuple[str | None, str | None], attention: str | None
) -> None:
    config, storage = opened_storage(Tiny(head_dim=32).write(tmp_path / "m.gguf"))
    cache_config = caching(None, 0, *types, attention)
    counts = model_cost(config, storage, cache_config)
    blocks = [layer.attention for layer in model_config(dict(config)).layers]
    shapes = [(each.cache_shape, each.window) for each in blocks]
    lengths = (1, 60, 300, 900)
    for length in lengths:
        step = decode_cost(counts, length - 1)
        assert step.cache_read == read_bytes(cache_config, shapes, mx.float32, length)
    reads = sum(read_bytes(cache_config, shapes, mx.float32, n) for n in range(51, 55))
    assert decode_cost(counts, 50, tokens=4, rows=2).cache_read == 2 * reads


def test_latent_attention_by_hand(tmp_path: Path) -> None:
    skeleton = read("deepseek2-lite")
    counts = model_cost(*opened_storage(skeleton.write(tmp_path / "x.gguf")))
    keys = skeleton.keys
    heads, latent = keys["attention.head_count"], keys["attention.kv_lora_rank"]
    turning = keys["rope.dimension_count"]
    (pair,) = {layer.pair for layer in counts.layers}
    # A score of latent and turned parts, and the latent that it weighs; in float32 here.
    assert pair == heads * (latent + turning) + heads * latent
    assert {layer.token for layer in counts.layers} == {4 * (latent + turning)}


def test_known_and_unknown_terms_of_a_class_of_mlx_lms(tmp_path: Path) -> None:
    config, storage = opened_storage(read("qwen3next-80b").write(tmp_path / "x.gguf"))
    assert config["model_type"] not in FAMILIES
    counts = model_cost(config, storage)
    assert counts.weights.total == pytest.approx(storage.nbytes)
    assert counts.active is None
    assert any("operations" in what for what in counts.unknown)
    work = decode_cost(counts, context=10)
    assert work.operations is None
    states = [layer for layer in counts.layers if layer.state]
    assert states
    assert work.cache_written >= sum(layer.fixed for layer in states)


@pytest.mark.parametrize(
    "name", ["granitemoehybrid", "helium", "jamba", "kimi_linear", "llama4", "mamba2", "nemotron_h"]
)
def test_a_class_of_mlx_lms_reads_the_experts_that_are_used(tmp_path: Path, name: str) -> None:
    model = stock(CONFIGS[name])
    sizes = {part: array.nbytes for part, array in named_arrays(model).items()}
    config, storage = opened_storage(save(tmp_path, CONFIGS[name], model), dtype="float32")
    experts = sum(size for part, size in sizes.items() if SWITCHED.search(part))
    table = sum(size for part, size in sizes.items() if TABLE.search(part))
    tied = not any("lm_head" in part for part in sizes)
    text = config.get("text_config", config)
    used = text.get("num_experts_per_tok", text.get("num_experts_per_token", 0)) / 4
    counts = model_cost(config, storage)
    row = table / text["vocab_size"]
    always = sum(sizes.values()) - experts - (0 if tied else table)
    assert (experts > 0) == (used > 0)
    assert counts.weights.read(1) == pytest.approx(always + row + used * experts)
    assert counts.weights.read(2) == pytest.approx(
        always + 2 * row + (1 - (1 - used) ** 2) * experts
    )
    assert counts.unknown == ("operations, and so whether compute binds",)


def test_experts_that_a_class_calls_as_it_likes_are_not_counted() -> None:
    class Apart(Module):
        """A model that calls each expert by itself, and one of them for any token."""

        def __init__(self, arguments: object) -> None:
            super().__init__()
            self.embed_tokens = Embedding(8, 4)
            self.layers = [Module()]
            self.layers[0].experts = [Linear(4, 4, bias=False) for _ in range(3)]

        def __call__(self, tokens: mx.array, cache: object) -> mx.array:
            x = self.layers[0].experts[0](self.embed_tokens(tokens))
            return self.embed_tokens.as_linear(x)

    arguments = SimpleNamespace(from_dict=lambda config: config)
    storage = WeightStorage(4 * (8 + 3 * 4) * 4, "float32", False, "")
    counts = mlx_lm_cost(MLXLMClasses(Apart, arguments), {"model_type": "apart"}, storage)
    assert counts.weights.total == storage.nbytes
    assert counts.weights.read(1) == 4 * (8 + 1) * 4
    assert any("experts" in what for what in counts.unknown)


def test_packed_weights_of_mlx_lms_classes_count_the_same(tmp_path: Path) -> None:
    name = "granitemoehybrid"
    config, storage = opened_storage(
        save(tmp_path, CONFIGS[name], stock(CONFIGS[name])), dtype="float32"
    )
    plain = model_cost(config, storage)
    packed = model_cost(config, replace(storage, nbytes=storage.nbytes // 4))
    assert packed.weights.read(1) == pytest.approx(plain.weights.read(1) / 4)
    assert any("packed" in what for what in packed.unknown)


def test_an_embedding_that_a_class_multiplies_by_itself_is_the_head() -> None:
    config = {
        "model_type": "minicpm", "hidden_size": 64, "dim_model_base": 64, "num_hidden_layers": 1,
        "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5, "vocab_size": 128, "scale_depth": 1.4, "scale_emb": 12,
        "max_position_embeddings": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    classes = definition(config)
    assert not isinstance(classes, ModelConfig)
    model = classes.module(config)
    storage = WeightStorage(
        sum(array.nbytes for array in named_arrays(model).values()), "float32", False, ""
    )
    weights = mlx_lm_cost(classes, config, storage).weights
    assert weights.head == pytest.approx(4 * 128 * 64)
    assert weights.table == 0
    assert weights.read(1) == pytest.approx(storage.nbytes + 4 * 64)
