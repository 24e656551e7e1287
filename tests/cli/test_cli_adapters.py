"""``--adapter``: applied by generate and chat, merged by convert, refused in one line."""

from __future__ import annotations

import json

import pytest
from gguf_adapters import write_adapter

import mlxrun

GREEDY = ["--temperature", "0", "--max-tokens", "12"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter") / "with:colon.gguf"
    shapes = {f"blk.{i}.attn_{part}.weight": (64, 64) for i in (0, 1) for part in ("q", "output")}
    return write_adapter(path, "llama", shapes, rank=8, alpha=64.0)


def expected(model, adapter):
    return mlxrun.load(model, adapter=adapter).generate("tea", temperature=0, max_tokens=12).text


def test_generate_applies_adapters(mlxrun_cli, model, adapter):
    plain = expected(model, ())
    for given, wanted in (
        ([adapter], [adapter]),
        ([f"{adapter}:0.5"], [(adapter, 0.5)]),
        ([f"{adapter}:0.5", f"{adapter}:-2"], [(adapter, -1.5)]),
    ):
        options = [word for path in given for word in ("--adapter", path)]
        result = mlxrun_cli("generate", model, "-p", "tea", *GREEDY, *options)
        assert (result.code, result.err) == (0, "")
        assert result.out == expected(model, wanted) + "\n" != plain + "\n"


def test_chat_applies_adapters(mlxrun_cli, model, adapter):
    plain = mlxrun_cli("chat", model, *GREEDY, stdin=b"hello\n")
    adapted = mlxrun_cli("chat", model, *GREEDY, "--adapter", adapter, stdin=b"hello\n")
    assert plain.code == adapted.code == 0
    assert plain.out != adapted.out


def test_convert_merges_adapters(mlxrun_cli, model, adapter, tmp_path):
    result = mlxrun_cli(
        "convert", model, "-o", tmp_path / "out", "--policy", "exact", "--json",
        "--adapter", f"{adapter}:0.5",
    )  # fmt: skip
    assert result.code == 0
    records = json.loads(result.out)["tensors"]
    assert sum(record["fidelity"] == "merged" for record in records) == 4
    assert expected(tmp_path / "out", ()) == expected(model, [(adapter, 0.5)])
    table = mlxrun_cli("convert", model, "-o", tmp_path / "two", "--adapter", adapter)
    assert "merged" in table.out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("missing.gguf", "there is no adapter at missing.gguf"),
        ("missing:0.5", "there is no adapter at missing"),
        ("MODEL", "is no adapter"),
        ("ADAPTER:nan", "a finite number"),
        (".", "is no adapter"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "convert"])
def test_what_is_none_is_refused_in_a_line(
    mlxrun_cli, model, adapter, tmp_path, command, given, message
):
    given = given.replace("MODEL", str(model)).replace("ADAPTER", str(adapter))
    rest = ["-p", "tea"] if command == "generate" else ["-o", tmp_path / "out"]
    result = mlxrun_cli(command, model, *rest, "--adapter", given)
    assert result.code != 0
    assert message in result.error
