"""Tokenizer of a GGUF file's metadata."""

from __future__ import annotations

from converters.gguf.reader import GGUFFile
from converters.gguf.vocab import KINDS, PRE_TOKENIZERS, TokenType, Vocabulary, read_vocabulary
from mlxrun.errors import TokenizerError
from mlxrun.text.encoders import encoder_of
from mlxrun.text.pieces import Pieces
from mlxrun.text.special import SpecialToken, SpecialTokens
from mlxrun.text.tokenizer import TokenizerParts

__all__ = ["gguf_parts", "vocabulary_parts"]


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
        before=_around(vocabulary, "bos", vocabulary.add_bos),
        after=_around(vocabulary, "eos", vocabulary.add_eos),
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


def _around(vocabulary: Vocabulary, role: str, wanted: bool) -> tuple[int, ...]:
    return (vocabulary.ids[role],) if wanted and role in vocabulary.ids else ()
