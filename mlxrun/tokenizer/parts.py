"""Tokenizer of a Hugging Face directory.

Reads ``tokenizer.json`` or, failing that, ``tokenizer.model``, and BOS, EOS, end-of-turn tokens and
chat templates from the other files. Where the converter wrote both, ``tokenizer.model`` is
preferred: it has the exact scores.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from converters.gguf.reader import GGUFFile
from converters.gguf.vocab import (
    KINDS,
    PRE_TOKENIZERS,
    TokenType,
    Vocabulary,
    end_ids,
    read_vocabulary,
)
from converters.huggingface.tokenizer_files import read_model
from mlxrun.errors import TokenizerError
from mlxrun.tokenizer.encoders import Encoder, LibraryEncoder, Pieces, encoder_of, kept_apart
from mlxrun.tokenizer.special_tokens import SpecialToken, SpecialTokens

__all__ = ["TokenizerParts", "directory_parts", "gguf_parts", "has_chat_template"]


@dataclass(frozen=True)
class TokenizerParts:
    """The parts of a tokenizer, from either source.

    Attributes:
        before, after: ids that ``add_special`` puts around a text.
        roles: ids of special tokens: "bos", "eos", "unknown", "padding" ...
        end_ids: tokens that end a turn or a text.
        strips_space: whether decoding drops the space that encoding puts in front.
        templates: chat templates by name, "default" among them if there are any.
    """

    pieces: Pieces
    encoder: Encoder
    special: SpecialTokens
    before: tuple[int, ...]
    after: tuple[int, ...]
    roles: Mapping[str, int]
    end_ids: frozenset[int]
    strips_space: bool
    templates: Mapping[str, str]


_ROLES: Final = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def directory_parts(path: Path) -> TokenizerParts:
    settings = _Settings(path)
    library, model = path / "tokenizer.json", path / "tokenizer.model"
    if model.is_file() and (settings.ours.get("kind") == "spm" or not library.is_file()):
        return vocabulary_parts(_vocabulary(model, settings))
    if library.is_file():
        document = _read_json(library)
        try:
            return _library_parts(LibraryFile(document), settings)
        except DAMAGE as reason:
            what = f"it has no {reason}" if isinstance(reason, KeyError) else reason
            raise TokenizerError(f"{library} is damaged: {what}") from None
    raise TokenizerError(
        f"{path} has no tokenizer", hint="It needs tokenizer.json or tokenizer.model."
    )


def has_chat_template(path: Path) -> bool:
    return "default" in _Settings(path).templates()


class _Settings:
    """The configuration files next to the vocabulary."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.tokenizer = _read_json(path / "tokenizer_config.json")
        self._map = _read_json(path / "special_tokens_map.json")
        self._generation = _read_json(path / "generation_config.json")
        self._model = _read_json(path / "config.json")
        ours = self.tokenizer.get("gguf")
        self.ours: Mapping[str, Any] = ours if isinstance(ours, dict) else {}

    @property
    def vocab_size(self) -> int:
        """The model's, which may exceed the number of tokens; 0 if unknown."""
        text = self._model.get("text_config")
        for config in (self._model, text if isinstance(text, dict) else {}):
            size = config.get("vocab_size")
            if isinstance(size, int) and 0 < size < 1 << 24:
                return size
        return 0

    def flag(self, name: str) -> bool | None:
        value = self.tokenizer.get(name)
        return value if isinstance(value, bool) else None

    def roles(self, ids: Mapping[str, int]) -> dict[str, int]:
        """Special tokens by role, given by text or else by id."""
        roles: dict[str, int] = {}
        for name, role in _ROLES.items():
            for source in (self.tokenizer, self._map):
                token = source.get(f"{name}_token")
                text = token.get("content") if isinstance(token, dict) else token
                if isinstance(text, str) and text in ids:
                    roles.setdefault(role, ids[text])
            for source in (self._generation, self._model):
                index = source.get(f"{name}_token_id")
                if isinstance(index, int) and 0 <= index < len(ids):
                    roles.setdefault(role, index)
        return roles

    def ends(self, ids: Mapping[str, int], roles: Mapping[str, int]) -> frozenset[int]:
        """End-of-turn tokens: those listed and, unless the list is ours, those known by text."""
        listed: set[int] = set()
        for source in (self._generation, self._model):
            value = source.get("eos_token_id")
            entries = value if isinstance(value, list) else [value]
            listed.update(entry for entry in entries if isinstance(entry, int))
        if self.ours and listed:
            return frozenset(listed)
        return frozenset(listed) | end_ids(ids, roles)

    def templates(self) -> dict[str, str]:
        """Chat templates by name; files win over tokenizer_config.json."""
        templates: dict[str, str] = {}
        for source in (self.tokenizer, _read_json(self._path / "chat_template.json")):
            value = source.get("chat_template")
            if isinstance(value, str):
                templates["default"] = value
            elif isinstance(value, list):
                templates |= {e["name"]: e["template"] for e in value if _is_template(e)}
        for file in sorted((self._path / "additional_chat_templates").glob("*.jinja")):
            templates[file.stem] = _read_text(file)
        main = self._path / "chat_template.jinja"
        if main.is_file():
            templates["default"] = _read_text(main)
        return templates

    def added(self) -> dict[int, dict[str, Any]]:
        """The entries of ``added_tokens_decoder`` by id."""
        entries = self.tokenizer.get("added_tokens_decoder")
        if not isinstance(entries, dict):
            return {}
        return {int(key): entry for key, entry in entries.items() if key.isdecimal()}


def _is_template(entry: Any) -> bool:
    return isinstance(entry, dict) and all(
        isinstance(entry.get(key), str) for key in ("name", "template")
    )


def _library_parts(file: LibraryFile, settings: _Settings) -> TokenizerParts:
    size = max([settings.vocab_size, *(index + 1 for index in file.vocab.values())])
    texts, types = file.token_types(size)
    roles = settings.roles(file.vocab)
    before, after = file.before, file.after
    if not before and settings.flag("add_bos_token") and "bos" in roles:
        before = (roles["bos"],)
    if not after and settings.flag("add_eos_token") and "eos" in roles:
        after = (roles["eos"],)
    special = {token.text: token.id for token in file.special}
    return TokenizerParts(
        pieces=Pieces(texts, types, file.byte_level, escaped=not file.byte_level),
        encoder=file.encoder(size, strict=bool(settings.ours)),
        special=SpecialTokens(file.special),
        before=before,
        after=after,
        roles=roles,
        end_ids=settings.ends(special, roles),
        strips_space=file.strips_space,
        templates=settings.templates(),
    )


def _vocabulary(path: Path, settings: _Settings) -> Vocabulary:
    """The vocabulary of a ``tokenizer.model`` with its added tokens."""
    try:
        model = read_model(path.read_bytes())
    except (ValueError, OSError) as reason:
        raise TokenizerError(f"{path.name} is damaged: {reason}") from None
    tokens, scores = list(model["tokens"]), list(model["scores"])
    types = [TokenType(type_) for type_ in model["types"]]
    added = settings.added()
    for index in range(len(tokens), max([settings.vocab_size, *(i + 1 for i in added)])):
        tokens.append(f"[UNUSED_{index}]")
        scores.append(0.0)
        types.append(TokenType.UNUSED)
    for index, entry in added.items():
        tokens[index] = entry["content"]
        special = entry.get("special")
        if types[index] != TokenType.UNKNOWN:
            types[index] = TokenType.CONTROL if special else TokenType.USER_DEFINED
    ids = {token: index for index, token in enumerate(tokens)}
    roles = settings.roles(ids)
    prefix = settings.ours.get("add_space_prefix", model["add_space_prefix"])
    return Vocabulary(
        kind="unigram" if model["unigram"] else "spm",
        tokens=tokens,
        types=types,
        scores=np.array(scores, np.float32),
        merges=[],
        pre=None,
        ids=roles,
        end_ids=settings.ends(ids, roles),
        add_bos=settings.flag("add_bos_token") is not False,
        add_eos=bool(settings.flag("add_eos_token")),
        add_space_prefix=bool(prefix),
        remove_extra_whitespaces=model["remove_extra_whitespaces"],
        lstrip=frozenset(index for index, entry in added.items() if entry.get("lstrip")),
        rstrip=frozenset(index for index, entry in added.items() if entry.get("rstrip")),
        charsmap=model["charsmap"],
        templates=settings.templates(),
    )


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as reason:
        raise TokenizerError(f"{path} is not valid JSON: {reason}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} must hold a JSON object")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as reason:
        raise TokenizerError(f"{path} cannot be read: {reason}") from None


def gguf_parts(gguf: GGUFFile) -> TokenizerParts:
    model, pre = gguf.get("tokenizer.ggml.model"), gguf.get("tokenizer.ggml.pre")
    if model is None:
        raise TokenizerError(f"{gguf.path.name} has no tokenizer: no tokenizer.ggml.model")
    if model not in KINDS:
        raise TokenizerError(f"{gguf.path.name}: tokenizers of kind {model!r} are not supported")
    if model == "gpt2" and pre and pre not in PRE_TOKENIZERS:
        raise TokenizerError(
            f"{gguf.path.name}: the pre-tokenizer {pre!r} is unknown",
            hint="Without its rules text would be cut wrongly: a newer release may know it.",
        )
    return vocabulary_parts(read_vocabulary(gguf))


def vocabulary_parts(vocabulary: Vocabulary) -> TokenizerParts:
    pre = vocabulary.pre
    return TokenizerParts(
        pieces=Pieces(
            vocabulary.tokens,
            vocabulary.types,
            byte_level=pre is not None and pre.byte_level,
            escaped=pre is None or pre.escape_spaces,
        ),
        encoder=encoder_of(vocabulary),
        special=_special_tokens(vocabulary),
        before=_one_if(vocabulary, "bos", vocabulary.add_bos),
        after=_one_if(vocabulary, "eos", vocabulary.add_eos),
        roles=vocabulary.ids,
        end_ids=vocabulary.end_ids,
        strips_space=vocabulary.add_space_prefix,
        templates=vocabulary.templates,
    )


def _special_tokens(vocabulary: Vocabulary) -> SpecialTokens:
    special = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
    return SpecialTokens(
        SpecialToken(
            vocabulary.tokens[index],
            index,
            control=type_ != TokenType.USER_DEFINED,
            lstrip=index in vocabulary.lstrip,
            rstrip=index in vocabulary.rstrip,
        )
        for index, type_ in enumerate(vocabulary.types)
        if type_ in special
    )


def _one_if(vocabulary: Vocabulary, role: str, wanted: bool) -> tuple[int, ...]:
    return (vocabulary.ids[role],) if wanted and role in vocabulary.ids else ()


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
