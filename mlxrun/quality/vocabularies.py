"""Whether two models spell text alike, without which their predictions cannot be compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from mlxrun.errors import TokenizerError

if TYPE_CHECKING:
    from mlxrun.llm import LLM


def check_same(a: LLM, b: LLM) -> None:
    """Refuse models whose logits do not mean the same tokens.

    Raises:
        TokenizerError: says what differs first.
    """
    one, other = a.tokenizer, b.tokenizer
    if a.model.vocab_size != b.model.vocab_size:
        _differ(f"A has {a.model.vocab_size} tokens, B has {b.model.vocab_size}")
    if one is other:
        return
    for token in range(min(one.vocab_size, other.vocab_size)):  # one may name the padding
        mine, its = one.piece(token), other.piece(token)
        # Files spell tokens in their own ways, and a mark's text may be none.
        if mine != its and one.token_bytes(token) != other.token_bytes(token):
            _differ(f"token {token} is {mine!r} in A and {its!r} in B")
    if one.prefix != other.prefix:
        _differ(f"A puts {_before(a)} before a text, B {_before(b)}")


def check_cut(a: Sequence[int], b: Sequence[int]) -> None:
    """Refuse a text's tokens if they are not the same to two models.

    Raises:
        TokenizerError: says where they differ first.
    """
    pairs = enumerate(zip(a, b, strict=False))
    place = next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
    if place < max(len(a), len(b)):
        _differ(f"they cut the text differently from token {place} on")


def _before(llm: LLM) -> str:
    return " ".join(map(llm.tokenizer.piece, llm.tokenizer.prefix)) or "nothing"


def _differ(what: str) -> NoReturn:
    raise TokenizerError(
        f"the models have different vocabularies: {what}",
        hint="Compare two forms of one model, or models that share a tokenizer",
    )
