"""SamplingParams: how the next token is sampled from the logits.

Standard library only. The formulas, and the order in which they are applied, are in
``mlxrun.sampling/sampling.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from mlxrun.config import Biases, OneOf, Range, Strings, check_options, documented, option

_FRACTION = Range(0, 1)
_MANY = 2**31 - 1
_COUNT = Range(0, _MANY, whole=True)
_RECENT = Range(-1, _MANY, whole=True)
_SEED = Range(0, 2**64 - 1, whole=True, words="None or a whole number between 0 and 2**64 - 1")


class SharedSamplingOptions(TypedDict, total=False):
    """Sampling options that hold for all prompts of a batch."""

    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    xtc_probability: float
    xtc_threshold: float
    dry_multiplier: float
    dry_base: float
    dry_allowed_length: int
    dry_penalty_last_n: int
    dry_sequence_breakers: str | Sequence[str]
    mirostat: int
    mirostat_tau: float
    mirostat_eta: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    penalty_last_n: int
    logit_bias: Mapping[int, float]
    logprobs: int


class SamplingOptions(SharedSamplingOptions, total=False):
    """The fields of :class:`SamplingParams`, one by one."""

    temperature: float
    seed: int | None


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is sampled from the logits. The defaults are those of llama.cpp.

    An object of this class is taken as it is: the recommendations of a model's own files
    (``LLM.defaults``) apply where single options are given instead, to those left out.

    Raises:
        ParameterError: a value of the wrong type, not finite, or outside its range.
    """

    temperature: float = option(
        0.8,
        Range(0, 100),
        "Divides the logits; 0 takes the likeliest token (greedy), and then truncation, XTC and "
        "mirostat have no effect.",
        metavar="X",
        alias="--temp",
    )
    top_k: int = option(40, _COUNT, "Keep the N likeliest tokens; 0: all.", metavar="N")
    top_p: float = option(
        0.95,
        _FRACTION,
        "Keep the likeliest tokens whose probabilities add up to X; 1: all.",
        metavar="X",
    )
    min_p: float = option(
        0.05, _FRACTION, "Drop tokens less likely than X times the likeliest; 0: off.", metavar="X"
    )
    typical_p: float = option(
        1.0,
        _FRACTION,
        "Keep the tokens whose surprisal is nearest to the entropy, up to a probability of X; 1: "
        "all.",
        metavar="X",
    )
    xtc_probability: float = option(
        0.0,
        _FRACTION,
        "How often XTC drops all but the least likely of the top choices; 0: never.",
        metavar="X",
    )
    xtc_threshold: float = option(
        0.1, _FRACTION, "The probability that makes a token a top choice of XTC.", metavar="X"
    )
    dry_multiplier: float = option(
        0.0,
        Range(0, 100),
        "Strength of DRY, the penalty on continuing a repetition; 0: off.",
        metavar="X",
    )
    dry_base: float = option(
        1.75, Range(1, 100), "DRY grows by this factor with each repeated token.", metavar="X"
    )
    dry_allowed_length: int = option(
        2,
        Range(1, _MANY, whole=True),
        "DRY ignores repetitions shorter than N tokens.",
        metavar="N",
    )
    dry_penalty_last_n: int = option(
        -1, _RECENT, "How many recent tokens DRY looks at; -1: all, 0: none.", metavar="N"
    )
    dry_sequence_breakers: tuple[str, ...] = option(
        ("\n", ":", '"', "*"), Strings(), "Text that ends a repetition for DRY.", metavar="TEXT"
    )
    mirostat: int = option(
        0,
        OneOf((0, 2), "0 (off) or 2"),
        "2: mirostat version 2 instead of all truncation; 0: off.",
        metavar="0|2",
    )
    mirostat_tau: float = option(
        5.0, Range(0, 100), "The surprisal that mirostat aims at, in bits.", metavar="X"
    )
    mirostat_eta: float = option(0.1, _FRACTION, "The learning rate of mirostat.", metavar="X")
    repetition_penalty: float = option(
        1.0,
        Range(0.01, 100),
        "Divides the positive logits of recent tokens and multiplies the negative ones; 1: off.",
        metavar="X",
    )
    presence_penalty: float = option(
        0.0, Range(-2, 2), "Subtracted from the logit of each recent token.", metavar="X"
    )
    frequency_penalty: float = option(
        0.0, Range(-2, 2), "Subtracted once for each occurrence.", metavar="X"
    )
    penalty_last_n: int = option(
        64,
        _RECENT,
        "How many tokens of prompt and completion are recent; -1: all, 0: none.",
        metavar="N",
    )
    logit_bias: Mapping[int, float] = option(
        {}, Biases(Range(-1000, 1000)), "Add X to a token's logit; -inf bans it.", metavar="ID=X"
    )
    seed: int | None = option(
        None,
        _SEED,
        "The same seed gives the same tokens; none: another one each time.",
        metavar="N",
    )
    logprobs: int = option(
        0,
        _COUNT,
        "Report the N likeliest tokens at each position with their log-probabilities, before "
        "sampling options act.",
        metavar="N",
    )

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0
