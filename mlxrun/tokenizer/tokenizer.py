"""Tokenizer of a GGUF file or a Hugging Face directory: encode, decode, chat prompts."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from converters.gguf.reader import GGUFFile, read_gguf
from mlxrun.errors import ParameterError, SourceError, TemplateError, TokenizerError
from mlxrun.tokenizer.chat_template import ChatTemplate, DefaultTemplate, Message, default_template
from mlxrun.tokenizer.detokenizer import StreamingDetokenizer
from mlxrun.tokenizer.parts import ROLES, TokenizerParts, directory_parts, gguf_parts
from mlxrun.tokenizer.special_tokens import Shield

__all__ = ["Tokenizer", "TokenizerParts", "load_tokenizer"]


class Tokenizer:
    """Encodes and decodes text and renders conversations as prompts. Thread-safe."""

    def __init__(self, parts: TokenizerParts) -> None:
        self._parts = parts
        self._tokens = parts.tokens

    @classmethod
    def from_gguf(cls, gguf: GGUFFile) -> Tokenizer:
        """The tokenizer of a GGUF file, also of a vocabulary-only one.

        Raises:
            GGUFError: damaged metadata, or an unknown kind of tokenizer or pre-tokenizer.
            TokenizerError: no tokenizer.
        """
        return cls(gguf_parts(gguf))

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a model directory.

        Raises:
            TokenizerError: no tokenizer, or one that is damaged or of an unknown kind.
        """
        return cls(directory_parts(Path(path)))

    @property
    def vocab_size(self) -> int:
        return len(self._tokens)

    @property
    def prefix(self) -> tuple[int, ...]:
        """Ids that ``encode`` puts before a text, such as BOS."""
        return self._parts.before

    @property
    def bos_id(self) -> int | None:
        return self._parts.roles.get("bos")

    @property
    def eos_id(self) -> int | None:
        return self._parts.roles.get("eos")

    @property
    def eog_ids(self) -> frozenset[int]:
        """End-of-generation tokens: all that end a turn or a text."""
        return self._parts.end_ids

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text; lone surrogates count as U+FFFD.
            add_special: add BOS and EOS where the model uses them.
            parse_special: recognize control tokens written in the text; never do this with text
                from users. User-defined tokens are always recognized.

        Raises:
            ParameterError: not a string.
        """
        ids = self._encode(self._parts.special.split(valid(text), control=parse_special))
        return [*self._parts.before, *ids, *self._parts.after] if add_special else ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of tokens; invalid UTF-8 becomes U+FFFD.

        A leading BOS and the leading space of SPM vocabularies are dropped, so that
        ``decode(encode(text)) == text``.

        Args:
            skip_special: leave out control tokens.

        Raises:
            TokenizerError: an id outside the vocabulary.
            ParameterError: not token ids.
        """
        if not isinstance(ids, Iterable) or isinstance(ids, str):
            raise ParameterError("ids", ids, "token ids")
        detokenizer = self.detokenizer(skip_special)
        return "".join(map(detokenizer.add, ids)) + detokenizer.finish()

    def detokenizer(
        self, skip_special: bool = False, *, continues: bool = False
    ) -> StreamingDetokenizer:
        """A streaming decoder; its joined output equals ``decode``.

        Args:
            skip_special: leave out control tokens.
            continues: the tokens continue an earlier text, so a leading space is kept.
        """
        token_bytes = self._visible_bytes if skip_special else self._tokens.to_bytes
        if continues:
            return StreamingDetokenizer(token_bytes)
        return StreamingDetokenizer(
            token_bytes,
            skip_first=self._parts.before[0] if self._parts.before else None,
            strip_space=self._parts.strips_space,
        )

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds to a text, maybe part of a character."""
        return self._tokens.to_bytes(token_id)

    def piece(self, token_id: int) -> str:
        """A token as written in the vocabulary."""
        return self._tokens.text(token_id)

    def is_control(self, token_id: int) -> bool:
        return self._tokens.is_control(token_id)

    @cached_property
    def default_template(self) -> DefaultTemplate | None:
        """The substitute template of a model that has none; else None."""
        return None if "default" in self._parts.templates else default_template(self._tokens.ids)

    @cached_property
    def chat_templates(self) -> Mapping[str, ChatTemplate]:
        """Chat templates by name, always with a "default".

        Warns at the first use if the model has none: it is probably a base model.
        """
        sources = dict(self._parts.templates)
        if self.default_template:
            sources["default"] = self.default_template.source
            warnings.warn(self.default_template.warning, stacklevel=2)
        return {name: self._template(source) for name, source in sources.items()}

    @cached_property
    def chat_template(self) -> ChatTemplate:
        return self.chat_templates["default"]

    def encode_chat(
        self,
        /,  # a variable may have that name
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Token ids of a conversation's prompt.

        The template's markers become control tokens; the same text inside a message does not.

        Args:
            messages: mappings with ``role`` and ``content``.
            add_generation_prompt: open the assistant's turn.
            tools: JSON schemas of functions.
            template: a name in ``chat_templates``; by default "tool_use" with tools if the model
                has it, else "default".
            kwargs: more template variables.

        Raises:
            TemplateError: the template refuses the messages or fails.
            TokenizerError: no template of that name.
            ParameterError: invalid messages or tools.
        """
        for name, value in (("messages", messages), ("tools", [] if tools is None else tools)):
            if not isinstance(value, Iterable) or isinstance(value, str | Mapping):
                raise ParameterError(name, value, "a sequence of mappings")
        shield = Shield(self._parts.special.control_texts())
        try:
            text = self._choose(template, tools).render(
                shield.escape(list(messages)),
                add_generation_prompt=add_generation_prompt,
                tools=shield.escape(tools),
                **{name: shield.escape(value) for name, value in kwargs.items()},
            )
        except RecursionError:
            raise TemplateError("the messages are nested too deeply") from None
        parts = self._parts.special.split(valid(text), control=True)
        ids = self._encode(shield.restore(p) if isinstance(p, str) else p for p in parts)
        before = self._parts.before
        return ids if tuple(ids[: len(before)]) == before else [*before, *ids]

    def _encode(self, parts: Iterable[str | int]) -> list[int]:
        """Ids of plain text and special tokens."""
        ids: list[int] = []
        for index, part in enumerate(parts):
            if isinstance(part, int):
                ids.append(part)
            elif part:
                ids += self._parts.encoder(part, index == 0)
        return ids

    def _visible_bytes(self, token_id: int) -> bytes:
        return b"" if self._tokens.is_control(token_id) else self._tokens.to_bytes(token_id)

    def _choose(self, name: str | None, tools: object) -> ChatTemplate:
        templates = self.chat_templates
        if name is None:
            name = "tool_use" if tools and "tool_use" in templates else "default"
        if not isinstance(name, str) or name not in templates:
            raise TokenizerError(
                f"there is no chat template {name!r}", hint=f"There is {', '.join(templates)}."
            )
        return templates[name]

    def _template(self, source: str) -> ChatTemplate:
        roles = self._parts.roles
        texts = {
            f"{n}_token": self.piece(roles[role]) for n, role in ROLES.items() if role in roles
        }
        return ChatTemplate(source, special_tokens=texts)

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size} tokens)"


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer of a ``.gguf`` file or a model directory.

    Raises:
        SourceError: nothing at that path.
        GGUFError, TokenizerError: no usable tokenizer there.
    """
    path = Path(source)
    if path.is_dir():
        return Tokenizer.from_directory(path)
    if path.is_file():
        return Tokenizer.from_gguf(read_gguf(path))
    raise SourceError(f"{source}: no such file or directory")


def valid(text: str) -> str:
    """The text with surrogate pairs joined and lone surrogates replaced."""
    if not isinstance(text, str):
        raise ParameterError("text", text, "a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
