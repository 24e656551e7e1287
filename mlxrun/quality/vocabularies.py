"""Whether two models spell text alike, without which their predictions cannot be compared."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from mlxrun.errors import TokenizerError

if TYPE_CHECKING:
    from mlxrun.llm import LLM


def check_same(a: LLM, b: LLM, text: str) -> None:
    """Refuse models whose logits do not mean the same tokens, or that cut a text differently.

    Raises:
        TokenizerError: says what differs first.
    """
    one, other = a.tokenizer, b.tokenizer
    if a.model.vocab_size != b.model.vocab_size:
        _differ(f"A has {a.model.vocab_size} logits, B has {b.model.vocab_size}")
    for token in range(min(one.vocab_size, other.vocab_size)):
        mine, its = one.token_bytes(token), other.token_bytes(token)
        if mine != its or one.is_control(token) != other.is_control(token):
            _differ(f"token {token} is {one.piece(token)!r} in A and {other.piece(token)!r} in B")
    if one.prefix != other.prefix:
        _differ(f"A puts {_spelt(a)} before a text, B {_spelt(b)}")
    ours, theirs = (each.encode(text, add_special=False) for each in (one, other))
    if ours != theirs:
        places = (i for i, (x, y) in enumerate(zip(ours, theirs, strict=False)) if x != y)
        place = next(places, min(len(ours), len(theirs)))
        _differ(f"they cut the text differently from token {place} on")


def _spelt(llm: LLM) -> str:
    return " ".join(map(llm.tokenizer.piece, llm.tokenizer.prefix)) or "nothing"


def _differ(what: str) -> NoReturn:
    raise TokenizerError(
        f"the models have different vocabularies: {what}",
        hint="Compare two forms of one model, or models that share a tokenizer",
    )
