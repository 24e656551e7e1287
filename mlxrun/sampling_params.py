"""How the next token is sampled from the logits: options, and a model's own defaults for them.

The formulas, and the order in which they are applied, are in ``mlxrun.sampling.sampler``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TypedDict

from converters.gguf.sampling import KEYS, decimal
from mlxrun.config import Biases, OneOf, Range, Strings, check_options, documented, option
from mlxrun.errors import CheckpointError, ParameterError

if TYPE_CHECKING:
    from converters.gguf.reader import GGUFFile


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


# Parameters that a model's files may set: those of transformers' GenerationConfig that exist here,
# and llama.cpp's.
RECOMMENDABLE: Final = frozenset({*KEYS.values(), "typical_p"})
_NAMES: Final = {**KEYS, **{name: name for name in RECOMMENDABLE}}


@dataclass(frozen=True)
class SamplingDefaults:
    """The sampling parameters of requests that set none.

    Attributes:
        params: all of them.
        names: those that the model's files recommend; the others are mlxrun's.
        source: the file that recommends them.
        problems: a line for each value of that file that cannot be used.
    """

    params: SamplingParams = field(default_factory=SamplingParams)
    names: frozenset[str] = frozenset()
    source: str = ""
    problems: tuple[str, ...] = ()

    @classmethod
    def of(cls, source: str, entries: Mapping[str, Any]) -> Self:
        """The defaults of a file.

        Args:
            source: its name, for messages.
            entries: of ``generation_config.json``, or metadata of a GGUF; unknown ones and null are
                ignored.
        """
        values: dict[str, Any] = {}
        problems = []
        for key, value in entries.items():
            name = _NAMES.get(key)
            if name is None or value is None:
                continue
            setting: Any = decimal(value) if key in KEYS else value
            if name == "top_k" and isinstance(setting, int) and setting == -1:
                setting = 0  # -1 is "all" to llama.cpp and vLLM
            try:
                values[name] = getattr(SamplingParams(**{name: setting}), name)
            except ParameterError as error:
                problem = ParameterError(f"{source}: {key}", value, error.allowed)
                default = getattr(SamplingParams(), name)
                problems.append(f"{problem}; mlxrun's default, {default}, is used")
        if entries.get("do_sample") is False:
            values["temperature"] = 0.0
        return cls(SamplingParams(**values), frozenset(values), source, tuple(problems))

    @property
    def values(self) -> dict[str, Any]:
        """The recommended ones."""
        return {f.name: getattr(self.params, f.name) for f in fields(self.params)
                if f.name in self.names}  # fmt: skip

    def origin(self, name: str) -> str:
        """Owner of a default: ``"the model's (FILE)"`` or ``"mlxrun's"``."""
        return f"the model's ({self.source})" if name in self.names else "mlxrun's"

    def __str__(self) -> str:
        if not self.names:
            return "mlxrun's own defaults: the model's files recommend none"
        listed = ", ".join(f"{name} {value:g}" for name, value in self.values.items())
        return f"{listed} ({self.source})"


def read_sampling_defaults(source: Path | GGUFFile) -> SamplingDefaults:
    """The sampling defaults of a model directory or a GGUF file; unusable ones are ``problems``."""
    if not isinstance(source, Path):
        return SamplingDefaults.of(source.path.name, source.metadata)
    from converters.huggingface.reader import read_object

    file = source / "generation_config.json"
    if not file.is_file():
        return SamplingDefaults()
    try:
        return SamplingDefaults.of(file.name, read_object(file))
    except CheckpointError as error:
        return SamplingDefaults(problems=(str(error),))
