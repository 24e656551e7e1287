"""Token sequences for the strings that break a repetition for DRY.

A tokenizer may have such a string inside a longer token or spread over several. One pass over the
vocabulary finds them all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence


def breaker_tokens(
    strings: Iterable[str],
    token_bytes: Sequence[bytes],
    encode: Callable[[str], list[int]],
) -> frozenset[tuple[int, ...]]:
    """The token sequences that end with or contain one of the strings.

    A token that contains the string is a sequence by itself; one that ends with a proper
    prefix of the string starts a sequence that continues with the tokens of the rest.

    Args:
        strings: the breakers, none empty.
        token_bytes: bytes of each token, empty for control tokens.
        encode: the tokenizer without special tokens.
    """
    targets = {string.encode("utf-8", "replace") for string in strings}
    prefixes = _prefixes(targets, max(map(len, token_bytes), default=0))
    longest = max(map(len, prefixes), default=0)
    lengths = sorted({len(target) for target in targets})
    tails: dict[bytes, tuple[int, ...]] = {}
    found: set[tuple[int, ...]] = set()
    for token, content in enumerate(token_bytes):
        contained = targets.intersection(_windows(content, lengths))
        if contained:
            found.add((token,))
        for length in range(1, min(longest, len(content)) + 1):
            for target in prefixes.get(content[-length:], ()):
                rest = target[length:]
                if rest not in tails:
                    tails[rest] = _tokens(rest, encode)
                if tails[rest] and target not in contained:
                    found.add((token, *tails[rest]))
    return frozenset(found)


def _prefixes(targets: Iterable[bytes], longest: int) -> dict[bytes, list[bytes]]:
    """The targets by each proper prefix of at most ``longest`` bytes."""
    found: dict[bytes, list[bytes]] = defaultdict(list)
    for target in targets:
        for length in range(1, min(len(target) - 1, longest) + 1):
            found[target[:length]].append(target)
    return found


def _windows(content: bytes, lengths: Iterable[int]) -> Iterator[bytes]:
    """Every substring of one of the lengths."""
    for length in lengths:
        for start in range(len(content) - length + 1):
            yield content[start : start + length]


def _tokens(rest: bytes, encode: Callable[[str], list[int]]) -> tuple[int, ...]:
    """The tokens of the rest; none if it starts within a character."""
    try:
        return tuple(encode(rest.decode()))
    except UnicodeDecodeError:
        return ()
