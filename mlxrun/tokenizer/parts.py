"""The parts of a tokenizer, from a GGUF's metadata or the files of a Hugging Face directory.

A directory has ``tokenizer.json`` or, failing that, ``tokenizer.model``; BOS, EOS, end-of-turn
tokens and chat templates are in its other files. Where the converter wrote both,
``tokenizer.model`` is preferred: it has the exact scores.
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
from converters.gguf.vocab import TokenType, Vocabulary, end_ids, read_vocabulary
from converters.huggingface.tokenizer_files import read_model
from mlxrun.errors import TokenizerError
from mlxrun.tokenizer.encoders import (
    Encoder,
    LibraryEncoder,
    Tokens,
    bpe_with_unknown_ids,
    encoder_of,
)
from mlxrun.tokenizer.special_tokens import SpecialToken, SpecialTokens

__all__ = ["TokenizerParts", "directory_parts", "gguf_parts", "has_chat_template"]

#: ``NAME_token`` of configurations and templates to the role of the token.
ROLES: Final = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_DAMAGE: Final = (KeyError, TypeError, AttributeError, ValueError, IndexError, RecursionError)
"""Exceptions that a malformed document raises."""
_BYTE: Final = re.compile(r"<0x[0-9A-F]{2}>")


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

    tokens: Tokens
    encoder: Encoder
    special: SpecialTokens
    before: tuple[int, ...]
    after: tuple[int, ...]
    roles: Mapping[str, int]
    end_ids: frozenset[int]
    strips_space: bool
    templates: Mapping[str, str]


def gguf_parts(gguf: GGUFFile) -> TokenizerParts:
    if gguf.get("tokenizer.ggml.model") is None:
        raise TokenizerError(f"{gguf.path.name} has no tokenizer: no tokenizer.ggml.model")
    return _vocabulary_parts(read_vocabulary(gguf))


def directory_parts(path: Path) -> TokenizerParts:
    settings = _Settings(path)
    library, model = path / "tokenizer.json", path / "tokenizer.model"
    if model.is_file() and (settings.converted.get("kind") == "spm" or not library.is_file()):
        return _vocabulary_parts(_vocabulary(model, settings))
    if library.is_file():
        document = _read_json(library)
        try:
            return _library_parts(_LibraryFile(document), settings)
        except _DAMAGE as reason:
            what = f"it has no {reason}" if isinstance(reason, KeyError) else reason
            raise TokenizerError(f"{library} is damaged: {what}") from None
    raise TokenizerError(
        f"{path} has no tokenizer", hint="It needs tokenizer.json or tokenizer.model."
    )


def has_chat_template(path: Path) -> bool:
    return "default" in _Settings(path).templates()


def _vocabulary_parts(vocabulary: Vocabulary) -> TokenizerParts:
    def added(role: str, add: bool) -> tuple[int, ...]:
        return (vocabulary.ids[role],) if add and role in vocabulary.ids else ()

    pre = vocabulary.pre
    special = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
    return TokenizerParts(
        tokens=Tokens(
            vocabulary.tokens,
            vocabulary.types,
            byte_level=pre is not None and pre.byte_level,
            escaped=pre is None or pre.escape_spaces,
        ),
        encoder=encoder_of(vocabulary),
        special=SpecialTokens(
            SpecialToken(
                vocabulary.tokens[index],
                index,
                control=type_ != TokenType.USER_DEFINED,
                lstrip=index in vocabulary.lstrip,
                rstrip=index in vocabulary.rstrip,
            )
            for index, type_ in enumerate(vocabulary.types)
            if type_ in special
        ),
        before=added("bos", vocabulary.add_bos),
        after=added("eos", vocabulary.add_eos),
        roles=vocabulary.ids,
        end_ids=vocabulary.end_ids,
        strips_space=vocabulary.add_space_prefix,
        templates=vocabulary.templates,
    )


def _library_parts(file: _LibraryFile, settings: _Settings) -> TokenizerParts:
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
        tokens=Tokens(texts, types, file.byte_level, escaped=not file.byte_level),
        encoder=file.encoder(size, like_llama_cpp=bool(settings.converted)),
        special=SpecialTokens(file.special),
        before=before,
        after=after,
        roles=roles,
        end_ids=settings.end_ids(special, roles),
        strips_space=file.strips_space,
        templates=settings.templates(),
    )


class _Settings:
    """The configuration files next to the vocabulary.

    Attributes:
        converted: facts of the GGUF that the directory was converted from; else empty.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tokenizer = _read_json(path / "tokenizer_config.json")
        self._map = _read_json(path / "special_tokens_map.json")
        self._generation = _read_json(path / "generation_config.json")
        self._model = _read_json(path / "config.json")
        converted = self._tokenizer.get("gguf")
        self.converted: Mapping[str, Any] = converted if isinstance(converted, dict) else {}

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
        value = self._tokenizer.get(name)
        return value if isinstance(value, bool) else None

    def roles(self, ids: Mapping[str, int]) -> dict[str, int]:
        """Special tokens by role, given by text or else by id."""
        roles: dict[str, int] = {}
        for name, role in ROLES.items():
            for source in (self._tokenizer, self._map):
                token = source.get(f"{name}_token")
                text = token.get("content") if isinstance(token, dict) else token
                if isinstance(text, str) and text in ids:
                    roles.setdefault(role, ids[text])
            for source in (self._generation, self._model):
                index = source.get(f"{name}_token_id")
                if isinstance(index, int) and 0 <= index < len(ids):
                    roles.setdefault(role, index)
        return roles

    def end_ids(self, ids: Mapping[str, int], roles: Mapping[str, int]) -> frozenset[int]:
        """End-of-turn tokens: those listed and, unless we wrote the list, those known by text."""
        listed: set[int] = set()
        for source in (self._generation, self._model):
            value = source.get("eos_token_id")
            entries = value if isinstance(value, list) else [value]
            listed.update(entry for entry in entries if isinstance(entry, int))
        if self.converted and listed:
            return frozenset(listed)
        return frozenset(listed) | end_ids(ids, roles)

    def templates(self) -> dict[str, str]:
        """Chat templates by name; files win over tokenizer_config.json."""
        templates: dict[str, str] = {}
        for source in (self._tokenizer, _read_json(self._path / "chat_template.json")):
            value = source.get("chat_template")
            if isinstance(value, str):
                templates["default"] = value
            for entry in value if isinstance(value, list) else []:
                match entry:
                    case {"name": str(name), "template": str(template)}:
                        templates[name] = template
        for file in sorted((self._path / "additional_chat_templates").glob("*.jinja")):
            templates[file.stem] = _read_text(file)
        main = self._path / "chat_template.jinja"
        if main.is_file():
            templates["default"] = _read_text(main)
        return templates

    def added_tokens(self) -> dict[int, dict[str, Any]]:
        """The entries of ``added_tokens_decoder`` by id."""
        entries = self._tokenizer.get("added_tokens_decoder")
        if not isinstance(entries, dict):
            return {}
        return {int(key): entry for key, entry in entries.items() if key.isdecimal()}


def _vocabulary(path: Path, settings: _Settings) -> Vocabulary:
    """The vocabulary of a ``tokenizer.model`` with its added tokens."""
    try:
        model = read_model(path.read_bytes())
    except (ValueError, OSError) as reason:
        raise TokenizerError(f"{path.name} is damaged: {reason}") from None
    tokens, scores = list(model["tokens"]), list(model["scores"])
    types = [TokenType(type_) for type_ in model["types"]]
    added = settings.added_tokens()
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
    prefix = settings.converted.get("add_space_prefix", model["add_space_prefix"])
    return Vocabulary(
        kind="unigram" if model["unigram"] else "spm",
        tokens=tokens,
        types=types,
        scores=np.array(scores, np.float32),
        merges=[],
        pre=None,
        ids=roles,
        end_ids=settings.end_ids(ids, roles),
        add_bos=settings.flag("add_bos_token") is not False,
        add_eos=bool(settings.flag("add_eos_token")),
        add_space_prefix=bool(prefix),
        remove_extra_whitespaces=model["remove_extra_whitespaces"],
        lstrip=frozenset(index for index, entry in added.items() if entry.get("lstrip")),
        rstrip=frozenset(index for index, entry in added.items() if entry.get("rstrip")),
        charsmap=model["charsmap"],
        templates=settings.templates(),
    )


class _LibraryFile:
    """A parsed ``tokenizer.json``; any method raises one of ``_DAMAGE`` if it is malformed."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._document = document
        self._model: Mapping[str, Any] = document["model"]
        self.special = [
            SpecialToken(
                entry["content"],
                entry["id"],
                control=bool(entry.get("special")),
                lstrip=bool(entry.get("lstrip")),
                rstrip=bool(entry.get("rstrip")),
            )
            for entry in document.get("added_tokens") or []
        ]
        self.vocab = self._vocab()
        self.before, self.after = self._around()

    @property
    def byte_level(self) -> bool:
        """Whether tokens are written in GPT-2's byte alphabet."""
        return any(step["type"] == "ByteLevel" for step in self._steps("decoder"))

    @property
    def strips_space(self) -> bool:
        """Whether decoding drops one space at the start."""
        return any(
            (step["type"] == "Strip" and step.get("start"))
            or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
            for step in self._steps("decoder")
        )

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

    def encoder(self, size: int, like_llama_cpp: bool) -> LibraryEncoder:
        """The encoder of plain text, which never returns a control token.

        Args:
            size: of the vocabulary.
            like_llama_cpp: do not merge across an unknown byte, as transformers does.
        """
        document = dict(self._document)
        if self._model.get("type") == "BPE":
            model = self._model_without_control()
            if like_llama_cpp:
                model = bpe_with_unknown_ids(model, size, self.byte_level)
            document["model"] = model
        rest = None  # the document for text after the first part, if that differs
        if any(
            step["type"] == "Metaspace" and step.get("prepend_scheme") == "first"
            for step in self._steps("pre_tokenizer")
        ):
            rest = {**document, "pre_tokenizer": _never_prepend(document["pre_tokenizer"])}
        return LibraryEncoder(document, size, rest=rest)

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

    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids that the post-processor puts before and after a text."""
        before: list[int] = []
        after: list[int] = []
        for step in self._steps("post_processor"):
            if step["type"] == "TemplateProcessing":
                side = before
                for item in step["single"]:
                    if "Sequence" in item:
                        side = after
                    else:
                        side += step["special_tokens"][item["SpecialToken"]["id"]]["ids"]
            elif step["type"] in ("BertProcessing", "RobertaProcessing"):
                before.append(self.vocab[step["cls"][0]])
                after.append(self.vocab[step["sep"][0]])
        return tuple(before), tuple(after)

    def _steps(self, component: str) -> Iterator[Mapping[str, Any]]:
        return _steps(self._document.get(component))


def _steps(component: Any) -> Iterator[Mapping[str, Any]]:
    """A component, or those of a (nested) sequence."""
    if not component:
        return
    if component["type"] != "Sequence":
        yield component
    for name in ("normalizers", "pretokenizers", "processors", "decoders"):
        for inner in component.get(name, []):
            yield from _steps(inner)


def _never_prepend(component: Any) -> Any:
    """A pre-tokenizer whose Metaspace puts no space before a text."""
    if component["type"] == "Metaspace":
        return {**component, "prepend_scheme": "never"}
    if component["type"] == "Sequence":
        inner: Sequence[Any] = component["pretokenizers"]
        return {**component, "pretokenizers": [_never_prepend(each) for each in inner]}
    return component


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
