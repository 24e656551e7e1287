"""Which token sequences carry the strings that break a sequence for DRY.

A breaker is a string, but the sampler sees tokens, and a tokenizer may bury a string inside a
longer token or spread it over several. This module looks through the vocabulary once; it knows
tokens as bytes and nothing about sampling. Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

__all__ = ["breaker_tokens"]


def breaker_tokens(
    strings: Iterable[str],
    pieces: Sequence[bytes],
    encode: Callable[[str], list[int]],
) -> frozenset[tuple[int, ...]]:
    """The token sequences that end with or contain one of the strings.

    A token that contains the string is a sequence of its own. One that ends with the string's
    beginning is the start of a sequence that goes on with the tokens of the rest.

    Args:
        strings: the breakers, none of them empty.
        pieces: what each token id stands for, empty for control tokens.
        encode: the tokenizer without special tokens.
    """
    found: set[tuple[int, ...]] = set()
    for string in strings:
        target = string.encode()
        tails: dict[bytes, tuple[int, ...]] = {}
        for token, piece in enumerate(pieces):
            if target in piece:
                found.add((token,))
                continue
            for rest in _rests(target, piece):
                if rest not in tails:
                    tails[rest] = _tokens(rest, encode)
                if tails[rest]:
                    found.add((token, *tails[rest]))
    return frozenset(found)


def _rests(target: bytes, piece: bytes) -> Iterator[bytes]:
    """What is left of the target after each beginning of it that the piece ends with."""
    for length in range(1, min(len(target) - 1, len(piece)) + 1):
        if piece.endswith(target[:length]):
            yield target[length:]


def _tokens(rest: bytes, encode: Callable[[str], list[int]]) -> tuple[int, ...]:
    """The tokens of the rest; none where it starts in the middle of a character."""
    try:
        return tuple(encode(rest.decode()))
    except UnicodeDecodeError:
        return ()
