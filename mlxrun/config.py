"""Options: how they are declared, and those of loading, of KV caches and of engines.

An option is a dataclass field made by :func:`option`: its default, the values it may take and its
help stand there and nowhere else. Constructors, the command line, its help and ``docs/cli.md`` go
by them. :class:`mlxrun.SamplingParams` and :class:`mlxrun.Request` declare theirs in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Protocol, Self, TypedDict, TypeVar

from converters.quantize import layout
from mlxrun.errors import ParameterError
from mlxrun.kv_cache import options
from mlxrun.kv_cache.options import NAMES, PER_CHANNEL, cache_type
from mlxrun.products import DEFAULT, PLANES

C = TypeVar("C", bound=type)


class Allowed(Protocol):
    """The values that an option may take."""

    def check(self, name: str, value: Any) -> Any:
        """``value`` as a plain value of its type.

        Raises:
            ParameterError: it is not allowed.
        """


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers from ``low`` to ``high``, both included."""

    low: float
    high: float = math.inf
    whole: bool = False
    words: str = ""

    def __str__(self) -> str:
        if self.words:
            return self.words
        kind = "a whole number" if self.whole else "a number"
        if self.high == math.inf:
            return f"{kind} of at least {self.low:g}"
        return f"{kind} between {self.low:.15g} and {self.high:.15g}"

    def check(self, name: str, value: Any) -> int | float:
        number = _plain(value, self.whole)
        if number is None or not self.low <= number <= self.high:
            raise ParameterError(name, value, str(self))
        return number


def _plain(value: Any, whole: bool) -> int | float | None:
    """``value`` as an int if ``whole``, else a finite float; None if it is no such number."""
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


@dataclass(frozen=True, slots=True)
class OneOf:
    """One of a few words or numbers."""

    values: tuple[str | int, ...]
    words: str = ""

    def check(self, name: str, value: Any) -> Any:
        known = isinstance(value, str | int) and not isinstance(value, bool)
        if not known or value not in self.values:
            allowed = self.words or f"one of {', '.join(map(str, self.values))}"
            raise ParameterError(name, value, allowed)
        return value


@dataclass(frozen=True, slots=True)
class Flag:
    def check(self, name: str, value: Any) -> Any:
        if not isinstance(value, bool):
            raise ParameterError(name, value, "True or False")
        return value


@dataclass(frozen=True, slots=True)
class Strings:
    """Strings, none of them empty; a single one may stand for a sequence of one."""

    def check(self, name: str, value: Any) -> tuple[str, ...]:
        strings = (value,) if isinstance(value, str) else value
        allowed = "a string or a sequence of strings, none of them empty"
        if not isinstance(strings, Iterable) or isinstance(strings, bytes | Mapping):
            raise ParameterError(name, value, allowed)
        checked = tuple(strings)
        if not all(isinstance(string, str) and string for string in checked):
            raise ParameterError(name, value, allowed)
        return checked


@dataclass(frozen=True, slots=True)
class Biases:
    """Biases of logits by token id; minus infinity bans a token."""

    added: Range

    def check(self, name: str, value: Any) -> dict[int, float]:
        if not isinstance(value, Mapping):
            raise ParameterError(name, value, "a mapping of token ids to numbers")
        checked: dict[int, float] = {}
        for token, bias in value.items():
            key = checked_token(name, token)
            banned = isinstance(bias, float) and bias == -math.inf
            checked[key] = bias if banned else self.added.check(f"{name}[{key}]", bias)
        return checked


@dataclass(frozen=True, slots=True)
class Written:
    """Text that a function can parse.

    Args:
        parse: takes the text and the option's name, and raises ParameterError.
        names: texts for a shell to complete.
    """

    parse: Callable[[Any, str], object]
    names: tuple[str, ...] = ()

    def check(self, name: str, value: Any) -> Any:
        self.parse(value, name)
        return value


def checked_token(name: str, token: object) -> int:
    """A token id as an int; ParameterError if it is none."""
    if isinstance(token, bool) or not isinstance(token, Integral) or token < 0:
        raise ParameterError(name, token, "made of token ids, whole numbers of at least 0")
    return int(token)


def check_callback(name: str, value: object, arguments: str) -> None:
    """Raise ParameterError unless ``value`` is None or a function of ``arguments``."""
    if value is not None and not callable(value):
        raise ParameterError(name, value, f"a function of {arguments}")


def known(options: Iterable[str], names: Sequence[str]) -> None:
    """Raise ParameterError for an option that is not one of ``names``; suggests the nearest."""
    for name in options:
        if name not in names:
            near = get_close_matches(name, names, n=3) or names
            raise ParameterError("an option", name, f"one such as {', '.join(near)}")


def names_of(options: type) -> list[str]:
    """The keys of a TypedDict and of its bases."""
    return list(options.__annotations__)


@dataclass(frozen=True, slots=True)
class Option:
    """The declaration of one option.

    Attributes:
        allowed: its values; None if the code that uses it checks them.
        help: one sentence or two.
        default_help: the default in words, if it depends on the model or machine.
        metavar: its value in help texts.
        alias: a second flag of the command line.
        optional: whether it may be None.
    """

    allowed: Allowed | None
    help: str
    default_help: str = ""
    metavar: str = ""
    alias: str = ""
    optional: bool = False

    def check(self, name: str, value: Any) -> Any:
        """``value`` as a plain value; ParameterError if it is not allowed."""
        if self.allowed is None or (value is None and self.optional):
            return value
        return self.allowed.check(name, value)


def option(default: Any, allowed: Allowed | None, help: str, **more: Any) -> Any:
    """A dataclass field that declares an option; see :class:`Option` for the arguments."""
    declared = Option(allowed, help, optional=default is None, **more)
    if isinstance(default, dict):
        return field(default_factory=default.copy, hash=False, metadata={"option": declared})
    return field(default=default, metadata={"option": declared})


def options_of(cls: type[Any]) -> dict[str, Option]:
    """The options that a class declares, by name."""
    return {f.name: f.metadata["option"] for f in fields(cls) if "option" in f.metadata}


def check_options(instance: Any) -> None:
    """Check the options of a frozen dataclass, and make their values plain."""
    for name, declared in options_of(type(instance)).items():
        object.__setattr__(instance, name, declared.check(name, getattr(instance, name)))


class Config:
    """Base of frozen dataclasses of options, which are checked."""

    __slots__ = ()

    def __post_init__(self) -> None:
        check_options(self)

    @classmethod
    def of(cls, options: Mapping[str, Any], *others: str) -> Self:
        """Options by name; ``others`` are names that the caller takes in addition."""
        known(options, [*others, *options_of(cls)])
        return cls(**options)


def documented(cls: C) -> C:
    """Append the options of a class to its docstring."""
    lines = [(cls.__doc__ or "").rstrip(), "", "    Options:"]
    for f in fields(cls):
        if declared := f.metadata.get("option"):
            default = declared.default_help or (repr(f.default) if f.default is not None else "")
            default = f"  [default: {default}]" if default else ""
            lines.append(f"    {f.name}: {declared.help}{default}")
    cls.__doc__ = "\n".join(lines)
    return cls


# --- loading ------------------------------------------------------------------------------------

DTYPES = ("float32", "float16", "bfloat16")
POLICIES = ("exact", "near", "compact")

AdapterChoice = str | Path | Sequence[str | Path | tuple[str | Path, float]]


class LoadOptions(TypedDict, total=False):
    """The options of :func:`mlxrun.load`: see :class:`LoadConfig`."""

    dtype: str | None
    policy: str | None
    products: str | None
    adapter: AdapterChoice
    wired: bool | int


@documented
@dataclass(frozen=True, kw_only=True)
class LoadConfig(Config):
    """How a model is loaded."""

    dtype: str | None = option(
        None,
        OneOf(DTYPES),
        "Type of the activations.",
        default_help="float32 on the CPU, half precision on a GPU",
    )
    policy: str | None = option(
        None,
        OneOf(POLICIES),
        "How the tensors of a GGUF become MLX's.",
        default_help="on the CPU they stay as they are in the file; else near",
    )
    products: str | None = option(
        None,
        OneOf(tuple(PLANES)),
        "Bits of activations where they are multiplied with a GGUF's own blocks, on the CPU: "
        + ", ".join(f"{name} {8 * planes}" for name, planes in PLANES.items())
        + ".",
        default_help=DEFAULT,
    )
    adapter: AdapterChoice = option(  # noqa: RUF009 - a field
        (),
        None,
        "Apply a LoRA adapter, at SCALE times its strength: a directory of mlx-lm's or PEFT's, or "
        "a GGUF of llama.cpp's. Several add up.",
        metavar="PATH[:SCALE]",
    )
    wired: bool | int = option(
        False,
        None,
        "Keep the model's memory from being swapped out, as far as the device recommends "
        "(Metal only).",
    )


# --- conversion ---------------------------------------------------------------------------------


class ConversionOptions(TypedDict, total=False):
    """The options of :func:`mlxrun.convert`: see :class:`ConversionConfig`."""

    bits: int | None
    group_size: int | None
    mode: str | None
    keep: str | None
    dtype: str | None
    policy: str | None


@documented
@dataclass(frozen=True, kw_only=True)
class ConversionConfig(Config):
    """The form that a conversion gives to weights."""

    bits: int | None = option(
        None, OneOf(layout.BITS), "Quantize to 2, 3, 4, 5, 6 or 8 bits a weight."
    )
    group_size: int | None = option(
        None,
        OneOf((16, *layout.GROUPS)),  # nvfp4 has 16
        "Weights that share a scale: 32, 64 or 128.",
        default_help=str(layout.DEFAULT_GROUP),
    )
    mode: str | None = option(
        None, OneOf(layout.MODES), "How to quantize.", default_help=layout.MODES[0]
    )
    keep: str | None = option(
        None,
        None,
        "Other forms for some matrices, such as lm_head=8,embed=8.",
        metavar="PATTERN=FORM,...",
    )
    dtype: str | None = option(None, OneOf(DTYPES), "Type of floats and of scales.")
    policy: str | None = option(
        None,
        OneOf(POLICIES),
        "How close a GGUF's weights must stay to the file's.",
        default_help="near",
    )


# --- KV caches ----------------------------------------------------------------------------------


class CacheTypeOptions(TypedDict, total=False):
    """How keys and values are stored."""

    cache_type_k: str | None
    cache_type_v: str | None


class StorageOptions(CacheTypeOptions, total=False):
    """The options of :class:`StorageConfig`, which a single request may have."""

    attention: str | None


class BatchStorageOptions(TypedDict, total=False):
    """:class:`StorageOptions` of a batch: one value, or a list with a value per prompt."""

    cache_type_k: str | Sequence[str | None] | None
    cache_type_v: str | Sequence[str | None] | None
    attention: str | Sequence[str | None] | None


class CacheOptions(StorageOptions, total=False):
    """The options of :meth:`mlxrun.LLM.session`: see :class:`CacheConfig`."""

    window: int | None
    keep: int


def _value_type(name: object, parameter: str) -> None:
    parsed = cache_type(name, parameter)
    if parsed is not None and parsed.per_channel:
        raise ParameterError(parameter, name, "without c, which is for keys")


def _cache_type(what: str, allowed: Written, more: str = "") -> Any:
    return option(
        None,
        allowed,
        f"How the cache stores {what}: {', '.join(NAMES)}, or with a group, q4/32{more}.",
        metavar="TYPE",
        default_help="as activations",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageConfig(Config):
    """How keys and values are stored, and which of them decoding attends to."""

    cache_type_k: str | None = _cache_type(
        "keys", Written(cache_type, (*NAMES, *PER_CHANNEL)), "; by channel, q4c"
    )
    cache_type_v: str | None = _cache_type("values", Written(_value_type, NAMES))
    attention: str | None = option(
        None,
        Written(options.pattern),
        "Tokens that each new one attends to: dense is all; window:1024+4 the last 1024 and the "
        "first 4, evicting others; strided:512/8 the last 512 and every 8th before; blocks:32x64 "
        "the 32 best blocks of 64 tokens. Prompts are prefilled densely.",
        metavar="PATTERN",
        default_help="dense",
    )

    @classmethod
    def of_types(cls, keys: str | None, values: str | None) -> Self:
        """The config of two cache types."""
        return cls(cache_type_k=keys, cache_type_v=values)

    @property
    def types(self) -> tuple[str | None, str | None]:
        """The cache types of keys and of values."""
        return self.cache_type_k, self.cache_type_v


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig(StorageConfig):
    """Which tokens are cached and attended to, and how their keys and values are stored.

    ``attention="window:1024+4"`` becomes ``window=1024, keep=4``, and ``"dense"`` None, so that
    equal configs make equal caches.

    Raises:
        ParameterError: a value outside its range, or ``attention`` in addition to ``window``.
    """

    window: int | None = option(
        None,
        Range(1, 2**31 - 1, whole=True),
        "Cache only the last N tokens, for a chat without end.",
        metavar="N",
    )
    keep: int = option(
        0,
        Range(0, 2**31 - 1, whole=True),
        "With a window: also cache the first N tokens.",
        metavar="N",
    )

    def __post_init__(self) -> None:
        check_options(self)
        pattern = options.pattern(self.attention)
        if pattern is not None and (self.window is not None or self.keep):
            raise ParameterError("attention", self.attention, "left out where a window is given")
        if isinstance(pattern, options.Window):
            object.__setattr__(self, "window", pattern.window)
            object.__setattr__(self, "keep", pattern.keep)
        if not isinstance(pattern, options.Strided | options.Blocks):
            object.__setattr__(self, "attention", None)

    @property
    def sparse(self) -> options.Sparse | None:
        """The pattern of attention over tokens that are all cached."""
        pattern = options.pattern(self.attention)
        return None if isinstance(pattern, options.Window) else pattern

    def to_dict(self) -> dict[str, Any]:
        """Its options by name."""
        return {name: getattr(self, name) for name in options_of(CacheConfig)}

    def overridden(self, own: StorageConfig) -> CacheConfig:
        """This config with a request's own values where they are not None.

        ``attention`` replaces a window, too.
        """
        names = options_of(StorageConfig)
        given = {name: getattr(own, name) for name in names if getattr(own, name) is not None}
        if "attention" in given:
            given |= {"window": None, "keep": 0}
        return replace(self, **given) if given else self


DEFAULT_CACHE = CacheConfig()


# --- engines ------------------------------------------------------------------------------------


class EngineOptions(StorageOptions, total=False):
    """The options of :class:`mlxrun.Engine`: see :class:`EngineConfig` and :class:`CacheConfig`."""

    parallel: int | None
    context: int | None
    queue: int
    deterministic: bool
    stall: float | None
    prefix_bytes: int | None


@documented
@dataclass(frozen=True, kw_only=True)
class EngineConfig(Config):
    """How many requests are served at once, and how."""

    parallel: int | None = option(
        None,
        Range(1, whole=True),
        "The most sequences that run at once.",
        default_help="as many as there is memory for with that context, up to 16; in a batch, 32",
        metavar="N",
    )
    context: int | None = option(
        None,
        Range(1, whole=True),
        "The most tokens of a sequence, prompt and completion.",
        default_help="as many as there is memory for, up to the model's context",
        metavar="N",
    )
    queue: int = option(
        1024, Range(1, whole=True), "The most requests that wait to begin.", metavar="N"
    )
    deterministic: bool = option(
        False,
        Flag(),
        "Compute each sequence by itself, so that not even rounding depends on the others.",
    )
    stall: float | None = option(
        None,
        Range(0, 3600),
        "Seconds by which prefill may delay the tokens of other sequences.",
        default_help="0.1; in a batch, any number",
        metavar="X",
    )
    prefix_bytes: int | None = option(
        None,
        Range(0, 2**63 - 1, whole=True),
        "Bytes of a prefix cache of its own, so that prompts that share a prefix compute it once; "
        "0 for none.",
        default_help="the model's prefix cache",
        metavar="N",
    )
    cache: CacheConfig = DEFAULT_CACHE

    @classmethod
    def of(cls, options: Mapping[str, Any], *others: str) -> Self:
        own, storage = options_of(cls), options_of(StorageConfig)
        known(options, [*others, *own, *storage])
        cache = CacheConfig(**{name: options[name] for name in storage if name in options})
        return cls(cache=cache, **{name: options[name] for name in own if name in options})
