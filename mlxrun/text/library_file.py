"""``tokenizer.json``: vocabulary, special tokens, and the encoder for plain text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from converters.gguf.vocab import TokenType
from mlxrun.text.encoders import LibraryEncoder, kept_apart
from mlxrun.text.special import SpecialToken

__all__ = ["DAMAGE", "LibraryFile"]

DAMAGE: Final = (KeyError, TypeError, AttributeError, ValueError, IndexError, RecursionError)
"""Exceptions that a malformed document raises."""

_BYTE: Final = re.compile(r"<0x[0-9A-F]{2}>")


class LibraryFile:
    """A parsed ``tokenizer.json``; any method raises one of ``DAMAGE`` if it is malformed."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._document = document
        self._model: Mapping[str, Any] = document["model"]
        self._added: Sequence[Mapping[str, Any]] = document.get("added_tokens") or []
        self.special = [_special(entry) for entry in self._added]
        self.vocab = self._vocab()
        self.before, self.after = _around(document.get("post_processor"), self.vocab)

    @property
    def byte_level(self) -> bool:
        """Whether tokens are written in GPT-2's byte alphabet."""
        return "ByteLevel" in _types(self._document.get("decoder"))

    @property
    def strips_space(self) -> bool:
        """Whether decoding drops one space at the start."""
        steps = list(_steps(self._document.get("decoder")))
        strip = any(step["type"] == "Strip" and step.get("start") for step in steps)
        metaspace = any(
            step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never"
            for step in steps
        )
        return strip or metaspace

    def token_types(self, size: int) -> tuple[list[str], list[TokenType]]:
        """Texts and types of ``size`` tokens; ids without a token are empty and unused."""
        texts, types = [""] * size, [TokenType.UNUSED] * size
        fallback = bool(self._model.get("byte_fallback"))
        for text, index in self.vocab.items():
            byte = fallback and _BYTE.fullmatch(text)
            texts[index], types[index] = text, TokenType.BYTE if byte else TokenType.NORMAL
        for token in self.special:
            texts[token.id] = token.text
            types[token.id] = TokenType.CONTROL if token.control else TokenType.USER_DEFINED
        return texts, types

    def encoder(self, size: int, strict: bool) -> LibraryEncoder:
        """The encoder of plain text, which never returns a control token.

        Args:
            size: of the vocabulary.
            strict: keep the neighbors of an unknown byte apart, as llama.cpp does; transformers
                joins them.
        """
        document = {**self._document, "added_tokens": [], "post_processor": None}
        document |= {"truncation": None, "padding": None}
        if self._model.get("type") == "BPE":
            model = self._model_without_control()
            document["model"] = kept_apart(model, size, self.byte_level) if strict else model
        return LibraryEncoder(document, _not_at_start(document), size)

    def _vocab(self) -> dict[str, int]:
        vocab = self._model["vocab"]
        if isinstance(vocab, list):  # Unigram: pairs of token and score
            vocab = {text: index for index, (text, _) in enumerate(vocab)}
        vocab = {**vocab, **{token.text: token.id for token in self.special}}
        if not all(isinstance(index, int) and 0 <= index < 1 << 24 for index in vocab.values()):
            raise ValueError("token ids out of range")
        return vocab

    def _model_without_control(self) -> dict[str, Any]:
        control = {token.text for token in self.special if token.control}
        control.discard(self._model.get("unk_token") or "")
        merges = self._model["merges"]
        if merges and isinstance(merges[0], str):
            merges = [merge.split(" ", 1) for merge in merges]
        return {
            **self._model,
            "vocab": {t: i for t, i in self._model["vocab"].items() if t not in control},
            "merges": [tuple(merge) for merge in merges],
        }


def _special(entry: Mapping[str, Any]) -> SpecialToken:
    return SpecialToken(
        entry["content"],
        entry["id"],
        control=bool(entry.get("special")),
        lstrip=bool(entry.get("lstrip")),
        rstrip=bool(entry.get("rstrip")),
    )


def _around(step: Any, vocab: Mapping[str, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that a post-processor puts before and after a text."""
    before: list[int] = []
    after: list[int] = []
    for part in _steps(step):
        if part["type"] == "TemplateProcessing":
            side = before
            for item in part["single"]:
                if "Sequence" in item:
                    side = after
                else:
                    side += part["special_tokens"][item["SpecialToken"]["id"]]["ids"]
        elif part["type"] in ("BertProcessing", "RobertaProcessing"):
            before.append(vocab[part["cls"][0]])
            after.append(vocab[part["sep"][0]])
    return tuple(before), tuple(after)


def _not_at_start(document: Mapping[str, Any]) -> dict[str, Any] | None:
    """The document for text after the first part, if Metaspace treats that differently."""
    step = document.get("pre_tokenizer")
    if not any(
        s["type"] == "Metaspace" and s.get("prepend_scheme") == "first" for s in _steps(step)
    ):
        return None
    return {**document, "pre_tokenizer": _never_prepend(step)}


def _never_prepend(step: Any) -> Any:
    if step["type"] == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    if step["type"] == "Sequence":
        return {**step, "pretokenizers": [_never_prepend(s) for s in step["pretokenizers"]]}
    return step


def _steps(step: Any) -> Iterator[Mapping[str, Any]]:
    """A component, or those of a (nested) sequence."""
    if not step:
        return
    if step["type"] != "Sequence":
        yield step
    for name in ("normalizers", "pretokenizers", "processors", "decoders"):
        for inner in step.get(name, []):
            yield from _steps(inner)


def _types(step: Any) -> set[str]:
    return {part["type"] for part in _steps(step)}
