"""``mlxrun inspect``: its facts are true of the model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
from tiny_models import Tiny

import mlxrun
from converters.gguf.reader import read_gguf
from mlxrun.cli.console import size
from mlxrun.cli.inspection import inspect_model

MIXED = {"*": "Q4_K", "output.weight": "Q6_K", "blk.0.ffn_down.weight": "Q8_0"}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("mixed") / "mixed.gguf"
    return Tiny(hidden=256, ffn=256, kinds=MIXED).write(path)


def test_tensors_by_type(mixed):
    facts = inspect_model(mixed, context=None)
    file = read_gguf(mixed)
    for row in facts["types"]:
        tensors = [t for t in file.tensors if t.type.name == row["type"]]
        assert row["tensors"] == len(tensors)
        assert row["bytes"] == sum(t.nbytes for t in tensors)
        assert row["weights"] == sum(t.elements for t in tensors)
    assert sum(row["tensors"] for row in facts["types"]) == len(file.tensors)


@pytest.mark.parametrize("policy", ["exact", "near", "compact"])
def test_estimates_are_what_conversion_does(mixed, policy, tmp_path):
    (estimate,) = inspect_model(mixed, context=None, policy=policy)["policies"]
    report = mlxrun.convert(mixed, tmp_path / "out", policy=policy)
    assert estimate["bytes"] == report.nbytes
    assert estimate["bits"] == pytest.approx(report.bits_after)
    found = {(t.type, t.form, t.fidelity) for t in report.tensors}
    assert {(f["type"], f["form"], f["fidelity"]) for f in estimate["forms"]} == found


@pytest.mark.parametrize("policy", ["near", "compact"])
def test_a_policy_is_planned_with(mixed, policy):
    facts = inspect_model(mixed, context=None, policy=policy)
    loaded = mlxrun.load(mixed, policy=policy).model.nbytes
    assert facts["plan"]["weights"] == loaded


def test_memory_as_it_is_run_here(mixed):
    facts = inspect_model(mixed, context=None)
    assert facts["plan"]["weights"] == mlxrun.load(mixed).model.nbytes


def test_a_directory_is_measured_by_its_weights_and_takes_no_policy(mlxrun_cli, mixed, tmp_path):
    """Its file is larger by the room of a header."""
    report = mlxrun.convert(mixed, tmp_path / "out")
    assert f"{size(report.nbytes)} of weights" in mlxrun_cli("inspect", tmp_path / "out").out
    refused = mlxrun_cli("inspect", tmp_path / "out", "--policy", "exact")
    assert refused.code == 2 and "converted already" in refused.err


@pytest.mark.parametrize("damaged", ["{}", "no JSON", None])
def test_a_tokenizer_that_cannot_be_used(mlxrun_cli, mixed, tmp_path, damaged):
    mlxrun.convert(mixed, tmp_path / "made")
    whole = mlxrun_cli("inspect", tmp_path / "made").out
    assert "cannot be used" not in whole
    for file in (tmp_path / "made").glob("tokenizer*"):
        file.unlink()
    if damaged is not None:
        (tmp_path / "made" / "tokenizer.json").write_text(damaged)
    for options in ((), ("-v",)):
        shown = mlxrun_cli("inspect", tmp_path / "made", *options)
        assert shown.code == 0
        assert re.search(r"tokenizer +cannot be used: .*tokenizer", shown.out)


def test_a_directory_is_what_was_converted(mixed, tmp_path):
    report = mlxrun.convert(mixed, tmp_path / "out")
    facts = inspect_model(tmp_path / "out", context=100)
    assert facts["problem"] is None
    assert sum(row["weights"] for row in facts["types"]) == report.elements
    assert sum(row["bytes"] for row in facts["types"]) == report.nbytes
    assert facts["conversion"] == {
        "source": "mixed.gguf",
        "policy": "near",
        "fidelity": report.fidelity(),
    }


def test_memory_of_the_cache(llm, model):
    """Keys and values of 2 layers, 2 heads, 16 wide."""
    facts = inspect_model(model, context=200)
    values = 2 * 2 * 2 * 16 * 200
    cache = {each["type"]: each["context"] for each in facts["cache_types"]}
    assert (cache["f16"], cache["f32"]) == (2 * values, 4 * values)
    session = llm.session()
    llm.generate([1] * 199, max_tokens=2, session=session, ignore_eos=True)
    per_slot = session.nbytes / session.cache[0].state[0].shape[2]
    assert cache["f32"] == 200 * per_slot


def test_window_layers_cache_their_window(tmp_path):
    config = {
        "model_type": "mistral", "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 8,
        "num_key_value_heads": 2, "num_hidden_layers": 3, "intermediate_size": 96,
        "sliding_window": 32, "max_position_embeddings": 64,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    facts = inspect_model(tmp_path, context=1000)
    cache = {each["type"]: each["context"] for each in facts["cache_types"]}
    assert cache["f16"] == 3 * 2 * 2 * 16 * 32 * 2
    assert facts["model"]["windows"] == [32, 32, 32]


def test_printed(mlxrun_cli, mixed):
    options = ("--context", "4096", "--policy", "near", "--tensors", "-v")
    result = mlxrun_cli("inspect", mixed, *options)
    assert (result.code, result.err) == (0, "")
    rows = [line.split() for line in result.out.splitlines()]
    assert ["llama.embedding_length", "256"] in rows
    assert ["kv_heads", "2"] in rows
    assert any(row[:2] == ["Q6_K", "1"] for row in rows)
    assert ["blk.0.attn_k.weight", "Q4_K", "[128,", "256]", "18.4", "kB"] in rows
    assert "(288 entries)" in result.out
    assert "Cache types, in bytes per token" in result.out
    assert "The model was trained for 2048 tokens, not for 4096." in result.out


def test_the_essentials_come_first(mlxrun_cli, mixed):
    result = mlxrun_cli("inspect", mixed)
    lines = result.out.splitlines()
    assert (result.code, result.err) == (0, "") and len(lines) < 20
    rows = dict(line.split("  ", 1) for line in lines if "  " in line)
    assert rows["architecture"].strip() == "llama" and rows["layers"].strip() == "2"
    assert rows["weights"].strip().endswith(" million: Q4_K, Q8_0, Q6_K, F32")
    assert rows["context"].strip() == "2048 tokens"
    assert "for one sequence of 2048 tokens" in rows["memory"]
    assert "It fits." in result.out and lines[-1] == "inspect -v shows everything."


@pytest.mark.parametrize(
    ("options", "title"),
    [
        (["--policy", "near"], "Forms under policy near"),
        (["--tensors"], "Tensors"),
        (["--chip", "m1-pro"], "Cost: one sequence"),
        (["--parallel", "2"], "Memory plan: 2 sequences of 2048 tokens"),
        (["--cache-type-k", "q8"], "+ keys and values"),
    ],
)
def test_requested_parts_are_shown_after_the_essentials(mlxrun_cli, mixed, options, title):
    lines = mlxrun_cli("inspect", mixed, *options).out.splitlines()
    assert any(line.startswith(title) for line in lines)
    assert not any(line.startswith(title) for line in mlxrun_cli("inspect", mixed).out.splitlines())


def test_json_has_everything(mlxrun_cli, mixed):
    facts = json.loads(mlxrun_cli("inspect", mixed, "--json").out)
    assert facts["metadata"]["llama.block_count"] == 2
    assert facts["metadata"]["tokenizer.ggml.tokens"]["length"] == 288
    assert [each["policy"] for each in facts["policies"]] == ["exact", "near", "compact"]
    assert "tensors" not in facts
    assert json.loads(mlxrun_cli("inspect", mixed, "--json", "--tensors").out)["tensors"]


def written(path: Path, arch: str, tensors: dict[str, np.ndarray], **keys: str) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(1)
    for key, value in keys.items():
        writer.add_string(f"general.{key}", value)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_vocabulary_only(mlxrun_cli, tmp_path):
    result = mlxrun_cli("inspect", written(tmp_path / "vocab.gguf", "llama", {}))
    assert result.code == 0
    assert "Cannot be run: a vocabulary without weights" in result.out


def test_unknown_architecture(mlxrun_cli, tmp_path):
    tensors = {"a.weight": np.ones((4, 32), np.float32), "b.weight": np.ones(4, np.int32)}
    path = written(tmp_path / "odd.gguf", "quaint", tensors)
    result = mlxrun_cli("inspect", path)
    assert result.code == 0
    assert "Cannot be run: odd.gguf: architecture 'quaint' is not supported" in result.out
    assert "Memory" not in result.out
    whole = mlxrun_cli("inspect", path, "-v")
    assert "refused: I32 cannot be converted" in whole.out
    assert "Cannot be run: odd.gguf: architecture 'quaint' is not supported" in whole.out
    assert "Memory" not in whole.out


def test_hostile_metadata_is_shown_harmlessly(mlxrun_cli, tmp_path):
    path = written(tmp_path / "evil.gguf", "llama", {}, name="\x1b]0;owned\x07[red]\nnext\x9b2J")
    shown = mlxrun_cli("inspect", path).out
    assert "[red]" in shown
    assert not {"\x1b", "\x07", "\x9b"} & set(shown)


@pytest.mark.parametrize(
    "header",
    [
        b"\xff" * 8,
        (5).to_bytes(8, "little") + b"nojson",
        (2).to_bytes(8, "little") + b"[]",
        (14).to_bytes(8, "little") + b'{"a": {"b": 1}}',
        (9).to_bytes(8, "little") + b'{"a": 1} ',
        b"",
    ],
)
def test_damaged_safetensors(mlxrun_cli, tmp_path, header):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(header)
    result = mlxrun_cli("inspect", tmp_path)
    assert result.code == 1
    assert "safetensors" in result.error


def test_a_tensor_without_weights(mlxrun_cli, tmp_path):
    path = tmp_path / "m"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    mx.save_safetensors(str(path / "model.safetensors"), {"a": mx.zeros((0,)), "b": mx.zeros((3,))})
    facts = json.loads(mlxrun_cli("inspect", path, "--json", "--tensors").out)
    assert [tensor["shape"] for tensor in facts["tensors"]] == [[0], [3]]
    mx.save_safetensors(str(path / "model.safetensors"), {"a": mx.zeros((0,))})
    result = mlxrun_cli("inspect", path)
    assert (result.code, result.err) == (0, "") and "F32" in result.out


def test_damaged_config(mlxrun_cli, tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    assert "not a JSON object" in mlxrun_cli("inspect", tmp_path).error


def test_the_memory_plan(mlxrun_cli, mixed, monkeypatch):
    """Its terms add up, the largest that fits does fit, and what is printed is the same."""
    monkeypatch.setenv("MLXRUN_MEMORY_LIMIT", "98MB")
    options = ("--context", "1000", "--parallel", "4", "--cache-type-k", "q8")
    plan = json.loads(mlxrun_cli("inspect", mixed, "--json", *options).out)["plan"]
    caches = 4 * plan["sequence"]
    assert plan["needed"] == plan["weights"] + caches + plan["scratch"] + plan["reserve"]
    assert plan["total"] == plan["needed"] + plan["kept"]
    assert plan["weights"] == mlxrun.load(mixed).model.nbytes
    assert (plan["fits"], plan["available"]) == (True, 98_000_000)
    longest = str(plan["largest_context"])
    assert 1000 < plan["largest_context"] < 2048
    for context, fits in ((longest, True), (str(int(longest) + 1), False)):
        shown = mlxrun_cli("inspect", mixed, "--json", *options, "--context", context).out
        assert json.loads(shown)["plan"]["fits"] is fits
    out = mlxrun_cli("inspect", mixed, *options, "-v").out
    assert "Memory plan: 4 sequences of 1000 tokens" in out
    room = f"There is room for 4 sequences of up to {longest} tokens, and for up to "
    assert f"It fits. {room}{plan['largest_parallel']} of 1000 tokens." in out


def test_a_plan_ends_at_the_context_of_the_model(mlxrun_cli, mixed, monkeypatch):
    monkeypatch.setenv("MLXRUN_MEMORY_LIMIT", "20GB")
    out = mlxrun_cli("inspect", mixed, "--context", "3k").out
    assert "room for one sequence of up to 2048 tokens, the model's context, and for" in out
    assert "The model was trained for 2048 tokens, not for 3072." in out
    plan = json.loads(mlxrun_cli("inspect", mixed, "--json").out)["plan"]
    assert json.loads(mlxrun_cli("inspect", mixed, "--json", "--context", "2k").out)["plan"] == plan
    assert plan["context"] == plan["largest_context"] == plan["trained_context"] == 2048


@pytest.mark.parametrize("option", ["--context", "--parallel"])
def test_numbers_beyond_all_memory(mlxrun_cli, mixed, option):
    assert "It does not fit." in mlxrun_cli("inspect", mixed, option, str(10**18)).out
    assert option in mlxrun_cli("inspect", mixed, option, str(10**400)).err


def test_no_room_for_so_many_sequences(mlxrun_cli, mixed, monkeypatch):
    monkeypatch.setenv("MLXRUN_MEMORY_LIMIT", "20GB")
    options = ("inspect", mixed, "--context", "4k", "--parallel", str(10**18))
    most = json.loads(mlxrun_cli(*options, "--json").out)["plan"]["largest_parallel"]
    shown = (
        f"It does not fit. There is no room for {10**18} sequences, however short; there is for "
        f"up to {most} of 4096 tokens."
    )
    assert shown in mlxrun_cli(*options).out
    assert json.loads(mlxrun_cli(*options[:-1], str(most), "--json").out)["plan"]["fits"]


def test_a_cache_that_does_not_fit_the_heads(mlxrun_cli, tmp_path):
    path = Tiny(head_dim=6, kv_heads=1).write(tmp_path / "odd.gguf")
    result = mlxrun_cli("inspect", path, "--cache-type-k", "q4")
    assert result.code == 1
    assert "divide neither the heads of this model" in result.error
