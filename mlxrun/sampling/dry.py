"""Token sequences for the strings that break a repetition for DRY.

A tokenizer may have such a string inside a longer token or spread over several. One pass over the
vocabulary finds them all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence


def breaker_tokens(
    strings: Iterable[str],
    pieces: Sequence[bytes],
    encode: Callable[[str], list[int]],
) -> frozenset[tuple[int, ...]]:
    """The token sequences that end with or contain one of the strings.

    A token that contains the string is a sequence by itself; one that ends with a head of the
    string starts a sequence that continues with the tokens of the rest.

    Args:
        strings: the breakers, none empty.
        pieces: bytes of each token, empty for control tokens.
        encode: the tokenizer without special tokens.
    """
    targets = {string.encode("utf-8", "replace") for string in strings}
    heads = _heads(targets, max(map(len, pieces), default=0))
    longest = max(map(len, heads), default=0)
    lengths = sorted({len(target) for target in targets})
    tails: dict[bytes, tuple[int, ...]] = {}
    found: set[tuple[int, ...]] = set()
    for token, piece in enumerate(pieces):
        contained = targets.intersection(_windows(piece, lengths))
        if contained:
            found.add((token,))
        for length in range(1, min(longest, len(piece)) + 1):
            for target in heads.get(piece[-length:], ()):
                rest = target[length:]
                if rest not in tails:
                    tails[rest] = _tokens(rest, encode)
                if tails[rest] and target not in contained:
                    found.add((token, *tails[rest]))
    return frozenset(found)


def _heads(targets: Iterable[bytes], longest: int) -> dict[bytes, list[bytes]]:
    """The targets by each proper head of at most ``longest`` bytes."""
    found: dict[bytes, list[bytes]] = defaultdict(list)
    for target in targets:
        for length in range(1, min(len(target) - 1, longest) + 1):
            found[target[:length]].append(target)
    return found


def _windows(piece: bytes, lengths: Iterable[int]) -> Iterator[bytes]:
    """Every part of a piece that has one of the lengths."""
    for length in lengths:
        for start in range(len(piece) - length + 1):
            yield piece[start : start + length]


def _tokens(rest: bytes, encode: Callable[[str], list[int]]) -> tuple[int, ...]:
    """The tokens of the rest; none if it starts within a character."""
    try:
        return tuple(encode(rest.decode()))
    except UnicodeDecodeError:
        return ()
