"""How the next token is to be chosen: every knob, its default and its allowed range.

Standard library only. This module does not know how the knobs act: their order and their formulas
are written down in ``mlxrun/generation/sampling.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any, Final

from mlxrun.errors import ParameterError

__all__ = ["SamplingParams"]


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers that a parameter may take: its bounds, both included."""

    low: float
    high: float = math.inf
    whole: bool = False

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        if self.high == math.inf:
            return f"{kind} of at least {self.low:g}"
        return f"{kind} between {self.low:.15g} and {self.high:.15g}"

    def check(self, name: str, value: object) -> int | float:
        """``value`` as a plain int or float; ParameterError when it is not in the range."""
        number = _plain(value, self.whole)
        if number is None or not self.low <= number <= self.high:
            raise ParameterError(name, value, str(self))
        return number


def known(options: Iterable[str], names: Sequence[str]) -> None:
    """Refuse options that have none of some names.

    Raises:
        ParameterError: the first that has none, and the names nearest to it, or all of them.
    """
    for option in options:
        if option not in names:
            near = get_close_matches(option, names, n=3) or names
            raise ParameterError("an option", option, f"one such as {', '.join(near)}")


def _plain(value: Any, whole: bool) -> int | float | None:
    """``value`` as an int if ``whole``, else a finite float; None where it is no such number."""
    fits = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if not fits:
        return None
    if whole:
        return int(value)
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


_FRACTION: Final = Range(0, 1)
_MANY: Final = 2**31 - 1
_RANGES: Final[Mapping[str, Range]] = {
    "temperature": Range(0, 100),
    "top_k": Range(0, _MANY, whole=True),
    "top_p": _FRACTION,
    "min_p": _FRACTION,
    "typical_p": _FRACTION,
    "xtc_probability": _FRACTION,
    "xtc_threshold": _FRACTION,
    "dry_multiplier": Range(0, 100),
    "dry_base": Range(1, 100),
    "dry_allowed_length": Range(1, _MANY, whole=True),
    "dry_penalty_last_n": Range(-1, _MANY, whole=True),
    "mirostat_tau": Range(0, 100),
    "mirostat_eta": _FRACTION,
    "repetition_penalty": Range(0.01, 100),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
    "penalty_last_n": Range(-1, _MANY, whole=True),
    "logprobs": Range(0, _MANY, whole=True),
}
_SEED: Final = Range(0, 2**64 - 1, whole=True)
_BIAS: Final = Range(-1000, 1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen from the logits. The defaults are those of llama.cpp.

    An object of this class is taken as it is: what a model's own files recommend
    (``LLM.defaults``) applies where single fields are given instead, to those left out.

    Args:
        temperature: logits are divided by it; 0 picks the likeliest token (greedy), and then
            truncation, XTC and mirostat have no say.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens whose probabilities reach this sum; 1 keeps all.
        min_p: drop tokens less likely than this fraction of the likeliest; 0 keeps all.
        typical_p: keep the tokens whose surprise is nearest to the entropy, up to this sum of
            probabilities; 1 keeps all.
        xtc_probability: how often XTC drops all but the least likely of the tokens that reach
            ``xtc_threshold``; 0 is never.
        xtc_threshold: the probability that makes a token one of XTC's top choices; above 0.5 no
            two tokens can reach it.
        dry_multiplier: strength of DRY, the penalty on continuing a repetition; 0 is off.
        dry_base: DRY grows by this factor with each further repeated token.
        dry_allowed_length: repetitions shorter than this many tokens cost nothing.
        dry_penalty_last_n: DRY looks at this many recent tokens; -1 is all, 0 is none.
        dry_sequence_breakers: strings across which DRY sees no repetition.
        mirostat: 2 replaces every truncation by mirostat version 2; 0 is off.
        mirostat_tau: the surprise, in bits, that mirostat steers to.
        mirostat_eta: how fast it steers.
        repetition_penalty: divides the positive and multiplies the negative logits of recent
            tokens; 1 is off.
        presence_penalty: subtracted from the logit of each recent token.
        frequency_penalty: subtracted once per occurrence.
        penalty_last_n: how many tokens, of prompt and reply, are recent; -1 is all, 0 is none.
        logit_bias: token id to what is added to its logit; ``-inf`` bans the token.
        seed: the same seed gives the same tokens; None takes a fresh one each time.
        logprobs: report this many of the likeliest tokens, with their log-probabilities under the
            model itself, beside each token; 0 reports none.

    Raises:
        ParameterError: a value of the wrong type, not finite, or outside its range.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_last_n: int = 64
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int | None = None
    logprobs: int = 0

    def __post_init__(self) -> None:
        for name, allowed in _RANGES.items():
            object.__setattr__(self, name, allowed.check(name, getattr(self, name)))
        if self.mirostat not in (0, 2) or isinstance(self.mirostat, bool):
            raise ParameterError("mirostat", self.mirostat, "0 (off) or 2")
        if self.seed is not None:
            object.__setattr__(self, "seed", _checked_seed(self.seed))
        breakers = checked_strings("dry_sequence_breakers", self.dry_sequence_breakers)
        object.__setattr__(self, "dry_sequence_breakers", breakers)
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))

    @property
    def greedy(self) -> bool:
        """Whether no token is left to chance."""
        return self.temperature == 0


def _checked_seed(seed: object) -> int:
    try:
        return int(_SEED.check("seed", seed))
    except ParameterError:
        allowed = "None or a whole number between 0 and 2**64 - 1"
        raise ParameterError("seed", seed, allowed) from None


def _checked_bias(bias: object) -> dict[int, float]:
    """A copy of the biases with plain keys and values."""
    if not isinstance(bias, Mapping):
        raise ParameterError("logit_bias", bias, "a mapping of token ids to numbers")
    checked: dict[int, float] = {}
    for token, value in bias.items():
        key = checked_token("logit_bias", token)
        if isinstance(value, float) and value == -math.inf:
            checked[key] = value
        else:
            checked[key] = _BIAS.check(f"logit_bias[{key}]", value)
    return checked


def checked_token(name: str, token: object) -> int:
    if isinstance(token, bool) or not isinstance(token, Integral) or token < 0:
        raise ParameterError(name, token, "made of token ids, whole numbers of at least 0")
    return int(token)


def check_callback(name: str, value: object, arguments: str) -> None:
    """Refuse what is given for a function and is none; ``arguments``: what it would be called with.

    Raises:
        ParameterError: that.
    """
    if value is not None and not callable(value):
        raise ParameterError(name, value, f"a function of {arguments}")


def checked_strings(name: str, value: object) -> tuple[str, ...]:
    """One string or several as a tuple; none of them may be empty."""
    strings = (value,) if isinstance(value, str) else value
    allowed = "a string or a sequence of strings, none of them empty"
    if not isinstance(strings, Iterable) or isinstance(strings, bytes | Mapping):
        raise ParameterError(name, value, allowed)
    checked = tuple(strings)
    if not all(isinstance(string, str) and string for string in checked):
        raise ParameterError(name, value, allowed)
    return checked
