"""A GGUF's vocabulary as the tokenizer files of a Hugging Face checkpoint.

``tokenizer.json`` gives stock transformers (and so mlx-lm) the ids that the GGUF gives; for SPM
vocabularies its merges are derived from the scores, and ``tokenizer.model`` has the scores.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from converters.gguf.pretokenizers import PreTokenizer
from converters.gguf.sampling import sampling_config
from converters.gguf.sentencepiece_model import merges_from_scores, model_proto
from converters.gguf.vocabulary import TokenType, Vocabulary, read_vocabulary, spelled

if TYPE_CHECKING:
    from converters.gguf.reader import GGUFFile

__all__ = ["bpe_pipeline", "known_merges", "tokenizer_files", "tokenizer_json"]

_ADDED = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
_SPACE = "\u2581"


def tokenizer_files(gguf: GGUFFile) -> dict[str, bytes]:
    """Name (with at most one folder) to contents of a checkpoint's tokenizer files.

    Raises:
        GGUFError: the vocabulary is damaged, or of a kind without such files (e.g. "rwkv").
    """
    vocabulary = read_vocabulary(gguf)
    if vocabulary.kind not in ("bpe", "spm"):
        raise gguf.error(
            "tokenizer.ggml.model", expected="a BPE or SPM vocabulary, to be converted"
        )
    files = {
        "tokenizer.json": _dump(tokenizer_json(vocabulary), indent=None),
        "tokenizer_config.json": _dump(_tokenizer_config(vocabulary)),
        "special_tokens_map.json": _dump(_special_tokens(vocabulary)),
        "generation_config.json": _dump(
            {**_generation_config(vocabulary), **sampling_config(gguf.metadata)}
        ),
    }
    if vocabulary.kind == "spm":
        files["tokenizer.model"] = model_proto(vocabulary)
    for name, template in vocabulary.templates.items():
        file = f"additional_chat_templates/{name}.jinja"
        files["chat_template.jinja" if name == "default" else file] = template.encode()
    return files


def tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """The contents of ``tokenizer.json`` for a BPE or SPM vocabulary."""
    pipeline = bpe_pipeline(vocabulary.pre) if vocabulary.pre else _spm_pipeline(vocabulary)
    spm = vocabulary.kind == "spm"
    merges = _spm_merges(vocabulary) if spm else known_merges(vocabulary.tokens, vocabulary.merges)
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": vocabulary.token("unknown") if spm else None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": spm,
        "byte_fallback": vocabulary.pre is None or not vocabulary.pre.byte_level,
        "ignore_merges": vocabulary.pre is not None and vocabulary.pre.ignore_merges,
        "vocab": {token: index for index, token in enumerate(spelled(vocabulary.tokens))},
        "merges": merges,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(vocabulary, index) for index in _added_ids(vocabulary)],
        **pipeline,
        "post_processor": _post_processor(vocabulary),
        "model": model,
    }


def bpe_pipeline(pre: PreTokenizer) -> dict[str, Any]:
    """Normalizer, pre-tokenizer and decoder of a BPE model."""
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False}
        for p in pre.patterns
    ]
    if pre.byte_level:
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        steps.append({**level, "use_regex": False})
        decoder: dict[str, Any] = {**level, "use_regex": True}
    else:
        decoder = _sequence("decoders", _spaces_back(), {"type": "ByteFallback"}, {"type": "Fuse"})
    return {
        "normalizer": _spaces_out() if pre.escape_spaces else None,
        "pre_tokenizer": _sequence("pretokenizers", *steps),
        "decoder": decoder,
    }


def known_merges(
    tokens: Sequence[str], merges: Sequence[tuple[str, str]]
) -> Sequence[tuple[str, str]]:
    """The merges of known tokens, without duplicates."""
    known = set(tokens)
    kept = dict.fromkeys(
        m for m in merges if m[0] in known and m[1] in known and "".join(m) in known
    )
    return list(kept) if len(kept) != len(merges) else merges


def _spm_pipeline(vocabulary: Vocabulary) -> dict[str, Any]:
    before: list[dict[str, Any]] = [_spaces_out()]
    after = [_spaces_back(), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if vocabulary.add_space_prefix:
        before.insert(0, {"type": "Prepend", "prepend": _SPACE})
        after.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": _sequence("normalizers", *before),
        "pre_tokenizer": None,
        "decoder": _sequence("decoders", *after),
    }


def _spm_merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Merges of all tokens but control, unknown and byte tokens."""
    hidden = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.BYTE)
    rows = zip(vocabulary.tokens, vocabulary.scores.tolist(), vocabulary.types, strict=True)
    usable = [(token, score) for token, score, type_ in rows if type_ not in hidden]
    return merges_from_scores([token for token, _ in usable], [score for _, score in usable])


def _spaces_out() -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}


def _spaces_back() -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}


def _sequence(field: str, *steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", field: list(steps)}


def _added_ids(vocabulary: Vocabulary) -> list[int]:
    return [index for index, type_ in enumerate(vocabulary.types) if type_ in _ADDED]


def _added(vocabulary: Vocabulary, index: int) -> dict[str, Any]:
    return {
        "id": index,
        "content": vocabulary.tokens[index],
        "single_word": False,
        "lstrip": index in vocabulary.lstrip,
        "rstrip": index in vocabulary.rstrip,
        "normalized": False,
        "special": vocabulary.types[index] != TokenType.USER_DEFINED,
    }


def _post_processor(vocabulary: Vocabulary) -> dict[str, Any] | None:
    """The template that adds BOS and EOS."""
    roles = [role for role in ("bos", "eos") if _adds(vocabulary, role)]
    if not roles:
        return None
    names = {role: vocabulary.tokens[vocabulary.ids[role]] for role in roles}
    marks = {role: [{"SpecialToken": {"id": name, "type_id": 0}}] for role, name in names.items()}
    single = [*marks.get("bos", []), {"Sequence": {"id": "A", "type_id": 0}}, *marks.get("eos", [])]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            name: {"id": name, "ids": [vocabulary.ids[role]], "tokens": [name]}
            for role, name in names.items()
        },
    }


def _adds(vocabulary: Vocabulary, role: str) -> bool:
    wanted = vocabulary.add_bos if role == "bos" else vocabulary.add_eos
    return wanted and role in vocabulary.ids


def _special_tokens(vocabulary: Vocabulary) -> dict[str, str]:
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    texts = {f"{name}_token": vocabulary.token(role) for name, role in roles.items()}
    return {name: text for name, text in texts.items() if text is not None}


def _tokenizer_config(vocabulary: Vocabulary) -> dict[str, Any]:
    decoder = {str(i): _added(vocabulary, i) for i in _added_ids(vocabulary)}
    for entry in decoder.values():
        del entry["id"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": decoder,
        **_special_tokens(vocabulary),
        "add_bos_token": _adds(vocabulary, "bos"),
        "add_eos_token": _adds(vocabulary, "eos"),
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        # Read by mlxrun only: tokenizer.model has the scores, from which merges are derived.
        "gguf": {"kind": vocabulary.kind, "add_space_prefix": vocabulary.add_space_prefix},
    }


def _generation_config(vocabulary: Vocabulary) -> dict[str, Any]:
    roles = {"bos": "bos", "pad": "padding"}
    ids = {f"{n}_token_id": vocabulary.ids[r] for n, r in roles.items() if r in vocabulary.ids}
    return {**ids, "eos_token_id": sorted(vocabulary.end_ids)}


def _dump(value: Any, indent: int | None = 2) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=indent).encode("utf-8", "replace")
