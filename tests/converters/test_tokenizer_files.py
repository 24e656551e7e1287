"""The tokenizer files of a checkpoint: for mlxrun, transformers and mlx-lm they mean the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from vocab_files import BYTE, USER, bpe, hard_text, keys, spm, suite, write_gguf

from converters.errors import GGUFError
from converters.gguf.reader import read_gguf
from converters.huggingface.tokenizer_files import merges_from_scores, tokenizer_files
from mlxrun.errors import TokenizerError
from mlxrun.tokenizer import Tokenizer, load_tokenizer

transformers = pytest.importorskip("transformers")


def convert(gguf: Path, target: Path) -> Path:
    for name, content in tokenizer_files(read_gguf(gguf)).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(content)
    (target / "config.json").write_text('{"model_type": "llama"}')
    return target


def agree(ours: Tokenizer, other: Tokenizer, text: str) -> None:
    for parse in (True, False):
        expected = ours.encode(text, parse_special=parse)
        assert other.encode(text, parse_special=parse) == expected, repr(text)
        assert other.decode(expected) == ours.decode(expected)


@pytest.mark.parametrize("name", ["llama-spm", "phi-3", "gpt-2", "deepseek-coder", "falcon"])
def test_suites_through_the_checkpoint(oracle: Path, tmp_path: Path, name: str) -> None:
    vocab = oracle / "vocabs" / f"ggml-vocab-{name}.gguf"
    ours = load_tokenizer(vocab)
    directory = convert(vocab, tmp_path)
    converted = Tokenizer.from_directory(directory)
    stock = transformers.AutoTokenizer.from_pretrained(str(directory))
    for text, ids in suite(vocab):
        assert stock.encode(text, add_special_tokens=False) == ids, repr(text)
        assert stock.encode(text) == ours.encode(text, parse_special=True)
        agree(ours, converted, text)
    assert converted.eog_ids == ours.eog_ids
    assert (converted.bos_id, converted.eos_id) == (ours.bos_id, ours.eos_id)
    ids_ = range(0, ours.vocab_size, 97)
    assert [converted.token_bytes(i) for i in ids_] == [ours.token_bytes(i) for i in ids_]


VARIANTS: dict[str, dict[str, Any]] = {
    "spm": spm(),
    "spm without prefix": spm(add_space_prefix=False),
    "spm with eos": spm(add_eos_token=True),
    "spm with one score": spm(scores=[0.0] * len(spm()["tokenizer.ggml.tokens"])),
    "bpe": bpe(),
    "bpe with bos": bpe("llama-bpe"),
    "bpe of lines": bpe("sarvam-moe"),
}


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=40, deadline=None)
@given(text=hard_text)
@example(text="lрусскийl")  # no token for what stands between: they are not merged
def test_a_converted_directory_is_the_gguf(variant: str, text: str, tmp_path_factory: Any) -> None:
    base = tmp_path_factory.getbasetemp() / variant.replace(" ", "-")
    gguf = base / "vocab.gguf"
    if not gguf.exists():
        base.mkdir()
        convert(write_gguf(gguf, VARIANTS[variant]), base / "hf")
    agree(load_tokenizer(gguf), Tokenizer.from_directory(base / "hf"), text)


@settings(max_examples=60, deadline=None)
@given(text=hard_text)
def test_merges_do_what_scores_do(text: str, tmp_path_factory: Any) -> None:
    """tokenizer.json alone, read by the transformers library, against sentencepiece."""
    base = tmp_path_factory.getbasetemp() / "merges"
    if not base.exists():
        base.mkdir()
        convert(write_gguf(base / "vocab.gguf", spm()), base / "hf")
        (base / "hf" / "tokenizer.model").unlink()
    ours = load_tokenizer(base / "vocab.gguf")
    agree(ours, Tokenizer.from_directory(base / "hf"), text)
    stock = transformers.AutoTokenizer.from_pretrained(str(base / "hf"))
    valid = text.encode("utf-8", "replace").decode()
    assert stock.encode(valid) == ours.encode(valid, parse_special=True)


@given(
    words=st.sets(st.text("ab", min_size=1, max_size=5), max_size=20).map(sorted),
    data=st.data(),
)
def test_merges_from_scores_are_all_cuts_best_first(words: list[str], data: st.DataObject) -> None:
    scores = data.draw(st.permutations([-float(i) for i in range(len(words))]))
    rank = dict(zip(words, scores, strict=True))
    merges = merges_from_scores(words, list(scores))
    cuts = {(w[:i], w[i:]) for w in words for i in range(1, len(w))}
    assert set(merges) == {(a, b) for a, b in cuts if a in rank and b in rank}
    ranks = [rank[a + b] for a, b in merges]
    assert ranks == sorted(ranks, reverse=True)


def test_templates_and_special_tokens(tmp_path: Path) -> None:
    more = {"tokenizer.chat_template.tool_use": "{{ tools }}", "tokenizer.chat_templates": ["x"]}
    gguf = write_gguf(tmp_path / "v.gguf", spm(chat_template="{{ bos_token }}") | more)
    directory = convert(gguf, tmp_path / "hf")
    assert (directory / "chat_template.jinja").read_text() == "{{ bos_token }}"
    stock = transformers.AutoTokenizer.from_pretrained(str(directory))
    assert stock.chat_template == {"default": "{{ bos_token }}", "tool_use": "{{ tools }}"}
    assert (stock.bos_token_id, stock.eos_token_id, stock.unk_token_id) == (1, 2, 0)
    ours, converted = load_tokenizer(gguf), Tokenizer.from_directory(directory)
    sources = {name: template.source for name, template in ours.chat_templates.items()}
    assert sources == {name: t.source for name, t in converted.chat_templates.items()}
    config = json.loads((directory / "tokenizer_config.json").read_text())
    assert config["added_tokens_decoder"]["1"]["special"] is True
    ends = json.loads((directory / "generation_config.json").read_text())["eos_token_id"]
    assert set(ends) == ours.eog_ids


def test_mlx_lm_loads_it(tmp_path: Path) -> None:
    utils = pytest.importorskip("mlx_lm.tokenizer_utils")
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    gguf = write_gguf(tmp_path / "v.gguf", spm(chat_template=template))
    directory = convert(gguf, tmp_path / "hf")
    ends = json.loads((directory / "generation_config.json").read_text())["eos_token_id"]
    stock, ours = utils.load(directory, eos_token_ids=ends), load_tokenizer(gguf)
    assert stock.eos_token_ids == ours.eog_ids
    messages = [{"role": "user", "content": "hell world"}]
    chat = stock.apply_chat_template(messages, tokenize=False)
    ids = stock.encode(chat, add_special_tokens=False)
    assert [1, *ids] == ours.encode_chat(messages)


def test_user_defined_and_odd_bytes_survive(tmp_path: Path) -> None:
    metadata = spm()
    metadata["tokenizer.ggml.tokens"] += ["he ll", "odd"]
    metadata["tokenizer.ggml.scores"] += [0.0, 0.0]
    metadata["tokenizer.ggml.token_type"] += [USER, BYTE]
    gguf = write_gguf(tmp_path / "v.gguf", metadata)
    ours = load_tokenizer(gguf)
    converted = Tokenizer.from_directory(convert(gguf, tmp_path / "hf"))
    for text in ("he ll", "xhe lly", "odd", "he\nll"):
        agree(ours, converted, text)
    assert ours.decode(ours.encode("he ll")) == "he ll"


def test_other_directories(tmp_path: Path) -> None:
    """No marks of ours: ends of turns come from the configs, ids from the library."""
    directory = convert(write_gguf(tmp_path / "v.gguf", bpe("llama-bpe")), tmp_path / "hf")
    config = json.loads((directory / "tokenizer_config.json").read_text())
    del config["gguf"]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    (directory / "config.json").write_text('{"eos_token_id": 5, "vocab_size": 300}')
    tok = Tokenizer.from_directory(directory)
    assert {3, 4, 5} < tok.eog_ids
    assert tok.vocab_size == 300
    assert tok.decode([299]) == ""
    assert tok.encode("hello") == [
        tok.bos_id,
        *load_tokenizer(tmp_path / "v.gguf").encode("hello")[1:],
    ]


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"model": 3}', '{"model": {"type": "BPE", "vocab": {"a": "b"}}}']
)
def test_damaged_directories(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_directory(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\xff" * 50, b"\x0a\x7f", b"\x0a\x02\x0a\x09"])
def test_damaged_models(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(TokenizerError):
        Tokenizer.from_directory(tmp_path)


def test_kinds_that_are_not_converted(tmp_path: Path) -> None:
    gguf = write_gguf(tmp_path / "v.gguf", keys(model="rwkv", tokens=["a", "b"]))
    with pytest.raises(GGUFError, match="BPE or SPM"):
        tokenizer_files(read_gguf(gguf))


@pytest.mark.parametrize("name", ["../../evil", "a/b", "..", "", "a" * 100, "a\nb"])
def test_a_templates_name_leads_nowhere(tmp_path: Path, name: str) -> None:
    """It becomes a file's name, and files of others must not say where to write."""
    metadata = spm() | {"tokenizer.chat_template.rag": "x", f"tokenizer.chat_template.{name}": "y"}
    gguf = read_gguf(write_gguf(tmp_path / "x.gguf", metadata))
    with pytest.raises(GGUFError, match="a name of letters"):
        tokenizer_files(gguf)


def test_a_template_that_is_not_utf8_is_written_as_it_is_read(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", spm() | {"tokenizer.chat_template": "a#b"})
    path.write_bytes(path.read_bytes().replace(b"a#b", b"a\xffb"))
    written = tokenizer_files(read_gguf(path))["chat_template.jinja"].decode()
    assert written == load_tokenizer(path).chat_template.source


def test_a_token_without_end_is_refused(tmp_path: Path) -> None:
    """Its cuts alone would take hours."""
    gguf = read_gguf(write_gguf(tmp_path / "x.gguf", spm(["a" * 200_000])))
    with pytest.raises(GGUFError, match=r"at most 4096 characters.*200000"):
        tokenizer_files(gguf)
