"""Text to tokens and back: special tokens, BOS and EOS, chat, over an encoder of plain text.

A tokenizer comes from a GGUF file or from a Hugging Face directory. Knows nothing of MLX.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.gguf.reader import GGUFFile, read_gguf
from mlxrun.errors import ParameterError, SourceError, TemplateError, TokenizerError
from mlxrun.text.default_templates import DefaultTemplate, default_template
from mlxrun.text.detokenizer import StreamingDetokenizer
from mlxrun.text.encoders import Encoder
from mlxrun.text.shield import Shield
from mlxrun.text.special import SpecialTokens
from mlxrun.text.template import ChatTemplate, Message

if TYPE_CHECKING:
    from mlxrun.text.pieces import Pieces

__all__ = ["Tokenizer", "TokenizerParts", "load_tokenizer"]


@dataclass(frozen=True)
class TokenizerParts:
    """What a tokenizer is made of, wherever it came from.

    Attributes:
        pieces: the tokens' texts, types and bytes.
        encoder: cuts plain text.
        special: finds special tokens in text.
        before, after: ids that ``add_special`` puts around a text.
        roles: ids of special tokens: "bos", "eos", "unknown", "padding" ...
        end_ids: every token that ends a turn or a text.
        strips_space: whether decoding drops the space that encoding puts in front.
        templates: chat templates by name; "default" is the one to use.
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


class Tokenizer:
    """Encodes and decodes text, and turns conversations into prompts.

    Several threads may use one tokenizer.
    """

    def __init__(self, parts: TokenizerParts) -> None:
        self._parts = parts
        self._pieces = parts.pieces

    @classmethod
    def from_gguf(cls, gguf: GGUFFile) -> Tokenizer:
        """The tokenizer of a GGUF file, which may be vocabulary-only.

        Raises:
            GGUFError: the vocabulary's metadata is damaged.
            TokenizerError: the kind of tokenizer or pre-tokenizer is unknown.
        """
        from mlxrun.text.from_gguf import gguf_parts

        return cls(gguf_parts(gguf))

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a converted or any Hugging Face directory.

        Raises:
            TokenizerError: there is no tokenizer, or it is damaged or of an unknown kind.
        """
        from mlxrun.text.from_directory import directory_parts

        return cls(directory_parts(Path(path)))

    @property
    def vocab_size(self) -> int:
        """How many tokens there are."""
        return len(self._pieces)

    @property
    def prefix(self) -> tuple[int, ...]:
        """Ids that ``encode`` puts before a text, such as BOS; maybe none."""
        return self._parts.before

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text."""
        return self._parts.roles.get("bos")

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text."""
        return self._parts.roles.get("eos")

    @property
    def eog_ids(self) -> frozenset[int]:
        """Every token that ends a turn or a text."""
        return self._parts.end_ids

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Cut a text into tokens.

        Args:
            text: any text; lone surrogates count as U+FFFD.
            add_special: put BOS and EOS around it, if the model wants them.
            parse_special: let control tokens written in the text become such. Never do this with
                text that others wrote. User-defined tokens are always recognised.

        Raises:
            ParameterError: this is no text.
        """
        pieces = self._parts.special.split(valid(text), control=parse_special)
        ids = self._encode_pieces(pieces)
        return [*self._parts.before, *ids, *self._parts.after] if add_special else ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of tokens; bytes that are no UTF-8 become U+FFFD.

        A BOS in front that ``encode`` adds, and the space that SPM vocabularies put before a text,
        are left out, so that ``decode(encode(text)) == text``.

        Args:
            ids: token ids.
            skip_special: leave out control tokens.

        Raises:
            TokenizerError: an id is outside the vocabulary.
            ParameterError: these are no ids.
        """
        if not isinstance(ids, Iterable) or isinstance(ids, str):
            raise ParameterError("ids", ids, "token ids")
        detokenizer = self.detokenizer(skip_special)
        return "".join(map(detokenizer.add, ids)) + detokenizer.finish()

    def detokenizer(
        self, skip_special: bool = False, *, continues: bool = False
    ) -> StreamingDetokenizer:
        """A decoder for tokens that come one by one; the whole equals ``decode``.

        Args:
            skip_special: leave out control tokens.
            continues: the tokens go on from a text before them, so that a leading space is theirs.
        """
        spell = self._pieces.spell_visible if skip_special else self._pieces.spell
        if continues:
            return StreamingDetokenizer(spell)
        return StreamingDetokenizer(
            spell,
            skip_first=self._parts.before[0] if self._parts.before else None,
            strip_space=self._parts.strips_space,
        )

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text, as bytes; maybe a part of a character."""
        return self._pieces.spell(token_id)

    def piece(self, token_id: int) -> str:
        """A token as the vocabulary spells it."""
        return self._pieces.text(token_id)

    def is_control(self, token_id: int) -> bool:
        """Whether a token is a mark rather than text."""
        return self._pieces.is_control(token_id)

    @cached_property
    def default_template(self) -> DefaultTemplate | None:
        """The template in place of the model's; None where it has its own."""
        return None if "default" in self._parts.templates else default_template(self._pieces.ids())

    @cached_property
    def chat_templates(self) -> Mapping[str, ChatTemplate]:
        """All chat templates by name; "default" is always there.

        Warns once, at the first use, where the model has none: it is probably a base model.
        """
        sources = dict(self._parts.templates)
        if self.default_template:
            sources["default"] = self.default_template.source
            warnings.warn(self.default_template.warning, stacklevel=2)
        return {name: self._template(source) for name, source in sources.items()}

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The template for conversations; a default where the model has none."""
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
        """The prompt for a conversation.

        The template's markers become control tokens; the same text inside a message does not.

        Args:
            messages: mappings with ``role`` and ``content``.
            add_generation_prompt: whether to open the assistant's turn.
            tools: JSON schemas of functions.
            template: which of ``chat_templates``; by default "tool_use" if there are tools and the
                model has it, else "default".
            kwargs: more variables for the template.

        Raises:
            TemplateError: the template refuses the messages or fails.
            TokenizerError: there is no template of that name.
            ParameterError: these are no messages or no tools.
        """
        for what, given in (("messages", messages), ("tools", [] if tools is None else tools)):
            if not isinstance(given, Iterable) or isinstance(given, str | Mapping):
                raise ParameterError(what, given, "a sequence of mappings")
        shield = Shield(self._parts.special.control_texts())
        try:
            text = self._choose(template, tools).render(
                shield.cover(list(messages)),
                add_generation_prompt=add_generation_prompt,
                tools=shield.cover(tools),
                **{name: shield.cover(value) for name, value in kwargs.items()},
            )
        except RecursionError:
            raise TemplateError("the messages are nested too deeply") from None
        split = self._parts.special.split(valid(text), control=True)
        pieces = [shield.restore(piece) if isinstance(piece, str) else piece for piece in split]
        ids = self._encode_pieces(pieces)
        before = self._parts.before
        return ids if tuple(ids[: len(before)]) == before else [*before, *ids]

    def _encode_pieces(self, pieces: Sequence[str | int]) -> list[int]:
        ids: list[int] = []
        for index, piece in enumerate(pieces):
            if isinstance(piece, int):
                ids.append(piece)
            elif piece:
                ids += self._parts.encoder(piece, index == 0)
        return ids

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
        names = {"unk_token": "unknown", "pad_token": "padding"}
        roles = self._parts.roles
        texts = {role: self.piece(index) for role, index in roles.items()}
        more = {name: texts[role] for name, role in names.items() if role in texts}
        return ChatTemplate(source, texts.get("bos"), texts.get("eos"), special_tokens=more)

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size} tokens)"


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer of a ``.gguf`` file (vocabulary-only ones too) or of a model directory.

    Raises:
        SourceError: there is nothing at that path.
        GGUFError, TokenizerError: what is there cannot be used.
    """
    path = Path(source)
    if path.is_dir():
        return Tokenizer.from_directory(path)
    if path.is_file():
        return Tokenizer.from_gguf(read_gguf(path))
    raise SourceError(f"{source}: no such file or directory")


def valid(text: str) -> str:
    """The text with pairs of surrogates joined and lone ones replaced."""
    if not isinstance(text, str):
        raise ParameterError("text", text, "a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
