"""Tokenizer of a Hugging Face directory.

Reads ``tokenizer.json`` or, failing that, ``tokenizer.model``, and BOS, EOS, end-of-turn tokens and
chat templates from the other files. Where the converter wrote both, ``tokenizer.model`` is
preferred: it has the exact scores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from converters.gguf.vocab import TokenType, Vocabulary, end_ids
from converters.huggingface.tokenizer_files import read_model
from mlxrun.errors import TokenizerError
from mlxrun.text.from_gguf import vocabulary_parts
from mlxrun.text.library_file import DAMAGE, LibraryFile
from mlxrun.text.pieces import Pieces
from mlxrun.text.special import SpecialTokens
from mlxrun.text.tokenizer import TokenizerParts

__all__ = ["directory_parts", "has_chat_template"]

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
