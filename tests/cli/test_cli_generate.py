"""``mlxrun generate``: the API's text, from every kind of prompt, in every kind of output."""

from __future__ import annotations

import io
import json
import sys

import pytest
from tiny_models import Tiny

from mlxrun.cli.main import run

GREEDY = ["--temperature", "0", "--max-tokens", "12"]


def expected(llm, prompt, **options):
    return llm.generate(prompt, **{"temperature": 0, "max_tokens": 12} | options)


def test_prints_what_the_api_generates(mlxrun_cli, model, llm):
    result = mlxrun_cli("generate", model, "--prompt", "tea", *GREEDY)
    assert (result.code, result.err) == (0, "")
    assert result.out == expected(llm, "tea").text + "\n"


def test_json_is_the_completion(mlxrun_cli, model, llm):
    result = mlxrun_cli("generate", model, "-p", "tea", *GREEDY, "--json", "--logprobs", "2")
    (line,) = result.out.splitlines()
    found = json.loads(line)
    wanted = expected(llm, "tea", logprobs=2).to_dict()
    assert found.pop("model") == str(model)
    assert set(found.pop("usage")) == set(wanted.pop("usage"))
    assert found == wanted


@pytest.mark.parametrize(
    ("args", "stdin", "prompt"),
    [
        ([], b"a line\n", "a line"),
        ([], b"\xef\xbb\xbftwo\r\nlines\r\n", "two\r\nlines"),
        (["-p", "-"], b"a line\n\n", "a line\n"),
        (["-p", "left alone"], b"ignored", "left alone"),
        (["-p", "before", "-p", "-"], b"after\n", "before\nafter"),
        (["-p", "before", "--file", "FILE"], b"ignored", "before\nfrom a file"),
        (["-f", "-"], b"a line", "a line"),
    ],
)
def test_where_the_prompt_comes_from(mlxrun_cli, model, llm, tmp_path, args, stdin, prompt):
    (tmp_path / "prompt.txt").write_text("from a file\n")
    args = [tmp_path / "prompt.txt" if arg == "FILE" else arg for arg in args]
    result = mlxrun_cli("generate", model, *args, *GREEDY, stdin=stdin)
    assert result.out == expected(llm, prompt).text + "\n"


def test_sampling_options_reach_the_sampler(mlxrun_cli, model, llm):
    result = mlxrun_cli(
        "generate", model, "-p", "tea", "-n", "20", "--seed", "7", "--temp", "1.5", "--top-k", "0",
        "--min-p", "0", "--logit-bias", "259=-inf", "--dry-multiplier", "1", "--json",
    )  # fmt: skip
    wanted = llm.generate(
        "tea", max_tokens=20, seed=7, temperature=1.5, top_k=0, min_p=0,
        logit_bias={259: -float("inf")}, dry_multiplier=1,
    )  # fmt: skip
    assert json.loads(result.out)["tokens"] == list(wanted.tokens)


def test_stop_and_ignore_eos(mlxrun_cli, model, llm):
    text = expected(llm, "tea").text
    stop = text[3:5]
    result = mlxrun_cli("generate", model, "-p", "tea", *GREEDY, "--stop", stop, "--ignore-eos")
    assert result.out == text[: text.index(stop)] + "\n"


def test_chat_applies_the_template(mlxrun_cli, model, llm):
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "tea"}]
    result = mlxrun_cli("generate", model, "-p", "tea", "--chat", "--system", "be", *GREEDY)
    assert result.out == expected(llm, messages).text + "\n"
    implied = mlxrun_cli("generate", model, "-p", "tea", "--system", "be", *GREEDY)
    assert implied.out == result.out


def test_parse_special(mlxrun_cli, model, llm):
    result = mlxrun_cli("generate", model, "-p", "a</s>b", "--parse-special", "--json", *GREEDY)
    wanted = expected(llm, "a</s>b", parse_special=True)
    assert json.loads(result.out)["usage"]["prompt_tokens"] == wanted.usage.prompt_tokens
    assert wanted.usage.prompt_tokens < expected(llm, "a</s>b").usage.prompt_tokens


def test_verbose_and_stats_speak_on_standard_error(mlxrun_cli, model):
    plain = mlxrun_cli("generate", model, "-p", "tea", *GREEDY)
    stats = mlxrun_cli("generate", model, "-p", "tea", *GREEDY, "--stats")
    verbose = mlxrun_cli("generate", model, "-p", "tea", *GREEDY, "-v", "--policy", "near")
    assert plain.out == stats.out == verbose.out
    assert "12 tokens at" in stats.error
    for part in ("llama, 2 layers", "dtype: ", "blas: ", "policy near", "12 tokens at"):
        assert part in verbose.err


def test_too_few_tokens_have_no_rate(mlxrun_cli, model):
    few = mlxrun_cli("generate", model, "-p", "tea", *GREEDY, "-n", "1", "--stats")
    assert "1 token, first after" in few.error


def test_a_terminal_gets_no_escape_sequences(mlxrun_cli, model, monkeypatch):
    """Token 30 is the byte ESC: a pipe gets it, a terminal its picture."""
    banned = [arg for i in range(3) for arg in ("--logit-bias", f"{i}=-inf")]
    args = ["generate", model, "-p", "x", "-n", "2", "--temp", "0", *banned]
    args += ["--logit-bias", "30=1000"]
    assert mlxrun_cli(*args).out == "\x1b\x1b\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert mlxrun_cli(*args).out == "␛␛\n"


def test_prompt_longer_than_the_context(mlxrun_cli, model):
    result = mlxrun_cli("generate", model, "-p", "word " * 300)
    assert result.code == 1 and result.out == ""
    assert "the model's context holds 256" in result.error


@pytest.mark.parametrize(
    ("args", "stdin", "message"),
    [
        (["-p", "x", "--logprobs", "2"], b"", "--logprobs needs --json"),
        (["-p", "x", "--chat", "--parse-special"], b"", "not for --chat"),
        (["-f", "no/such/file"], b"", "does not exist"),
        (["-p", "x", "--dtype", "int8"], b"", "'int8' is not one of"),
    ],
)
def test_wrong_usage(mlxrun_cli, model, args, stdin, message):
    result = mlxrun_cli("generate", model, *args, stdin=stdin)
    assert result.code == 2 and result.out == ""
    assert message in result.err


def test_a_prompt_without_end_is_refused(mlxrun_cli, model, monkeypatch):
    result = mlxrun_cli("generate", model, "-f", "/dev/zero")
    assert result.code == 1
    assert result.error.startswith("error: /dev/zero holds more than 100 MB")
    monkeypatch.setattr("mlxrun.cli.loading.LONGEST_TEXT", 10)
    result = mlxrun_cli("generate", model, stdin=b"x" * 11)
    assert result.code == 1 and "Standard input holds more than 10 B" in result.error


def test_a_prompt_that_is_not_text(mlxrun_cli, model):
    result = mlxrun_cli("generate", model, stdin=b"ab\xff")
    assert result.code == 1
    assert "Standard input is not UTF-8 text: invalid start byte at 2" in result.error


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_without_prompt_is_wrong_usage(model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert run(["generate", str(model)]) == 2
    assert "Give --prompt or --file" in capsys.readouterr().err


def test_says_which_tensors_a_model_has_no_place_for(mlxrun_cli, tmp_path, monkeypatch):
    tiny, stray = Tiny(), "blk.0.attn_sinks.weight"
    shapes = tiny.shapes() | {stray: (4,)}
    monkeypatch.setattr(tiny, "shapes", lambda: shapes)
    result = mlxrun_cli("generate", tiny.write(tmp_path / "x.gguf"), "-p", "tea", *GREEDY)
    assert result.code == 0
    assert result.error.startswith(f"warning: left out {stray}:")
