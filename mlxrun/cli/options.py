"""Options that commands share, made from their declarations in the configs, and their types.

``SETTINGS`` are those that ``/set`` changes in a chat, too. Standard library and click only.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from mlxrun.config import (
    Biases,
    CacheConfig,
    CacheTypeOptions,
    Flag,
    LoadConfig,
    OneOf,
    Option,
    Range,
    Strings,
    Written,
    names_of,
    options_of,
)
from mlxrun.errors import ParameterError
from mlxrun.outputs import MAX_TOKENS, Request
from mlxrun.sampling_params import RECOMMENDABLE, SamplingParams

Values = dict[str, Any]
Callback = Callable[..., None]
Adapters = list[tuple[str, float]]

# Larger counts would leave the range of floats.
MAX_COUNT = 10**18
CHAT_MAX_TOKENS = 2048


# --- sections of help texts -----------------------------------------------------------------------


class SectionedOption(click.Option):
    """An option that stands under a heading in the help text."""

    def __init__(self, *args: Any, section: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class Command(click.Command):
    """A command whose help lists options by section: "Options", then others as they occur."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if isinstance(parameter, click.Option) and record is not None:
                section = getattr(parameter, "section", "Options")
                sections.setdefault(section, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


# --- types ----------------------------------------------------------------------------------------


_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}


def parse_count(text: str) -> int | None:
    """The value of ``128``, ``4k`` or ``1e3``, k being 1024; None for anything else."""
    match = re.fullmatch(r"([0-9]{1,19})(?:e([0-9]{1,2})|([km]?))", text.strip().lower())
    if not match:
        return None
    return int(match[1]) * (10 ** int(match[2]) if match[2] else _UNITS[match[3]])


class CountList(click.ParamType[tuple[int, ...]]):
    """Distinct numbers such as ``128,512`` or ``1k,4k``."""

    name = "LIST"

    def __init__(self, low: int = 0, high: int = 1 << 24) -> None:
        self._low, self._high = low, high

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        found = [parse_count(part) for part in value.split(",")]
        counts = [n for n in found if n is not None and self._low <= n <= self._high]
        if len(counts) < len(found):
            allowed = f"numbers from {self._low} to {self._high} such as 128,512 or 1k"
            self.fail(f"{value!r} is not {allowed}.", param, ctx)
        return tuple(dict.fromkeys(counts))


_PLAIN = re.compile(r"[\w.,:/@%+=~-]+")


class ModelName(click.ParamType[str]):
    """A model's name; shells complete it from the hub's local cache and from folders."""

    name = "MODEL"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        # Shells do not quote completions: other characters would be several words, or a command.
        names = sorted(filter(_PLAIN.fullmatch, {*_local(incomplete), *_cached(incomplete)}))
        # Without any, the shell completes files, such as a folder to go on in.
        return [CompletionItem(name) for name in names] or [CompletionItem(incomplete, type="file")]


def _local(incomplete: str) -> Iterator[str]:
    """GGUF files and model directories in the folder that is typed."""
    folder, start = os.path.split(incomplete)
    try:
        for entry in list(Path(folder or ".").expanduser().iterdir()):
            is_model = entry.suffix.lower() == ".gguf" or (entry / "config.json").is_file()
            if entry.name.startswith(start) and is_model:
                yield os.path.join(folder, entry.name)  # noqa: PTH118 - "./" and "~" stay
    except (OSError, ValueError, RuntimeError):
        return


def _cached(incomplete: str) -> Iterator[str]:
    """Repositories in huggingface_hub's cache."""
    home = os.environ.get("HF_HOME") or os.path.join(  # noqa: PTH118
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"
    )
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    try:
        for entry in Path(cache or os.path.join(home, "hub")).expanduser().iterdir():  # noqa: PTH118
            kind, _, repo = entry.name.partition("--")
            name = repo.replace("--", "/", 1)
            if kind == "models" and name.startswith(incomplete):
                yield name
    except (OSError, RuntimeError):
        return


# --- values as users write them -------------------------------------------------------------------


def parse(name: str, declared: Option, words: Sequence[str]) -> Any:
    """The value of the words that a user wrote for an option."""
    allowed = declared.allowed
    none = [word.lower() for word in words] in ([], ["none"])
    if isinstance(allowed, Strings):
        return declared.check(name, () if none else tuple(map(_unescape, words)))
    if isinstance(allowed, Biases):
        pairs = (word.partition("=") for word in (() if none else words))
        return declared.check(name, {_number(token): _number(bias) for token, _, bias in pairs})
    if len(words) != 1:
        raise ParameterError(name, " ".join(words), "one value")
    if isinstance(allowed, Written):
        return declared.check(name, words[0])
    if declared.optional and words[0].lower() in ("none", "random"):
        return None
    whole = isinstance(allowed, Range) and allowed.whole
    count = parse_count(words[0]) if whole else None
    return declared.check(name, _number(words[0]) if count is None else count)


def words_of(value: Any) -> list[str]:
    """A value as a user would write it: the inverse of :func:`parse`."""
    if value is None:
        return ["none"]
    if isinstance(value, Mapping):
        return [f"{key}={str(number).removesuffix('.0')}" for key, number in value.items()]
    if isinstance(value, tuple):
        return [_escape(text) for text in value]
    return [str(value).removesuffix(".0")]


def show(value: Any) -> str:
    """A value on one line, as ``/set`` takes it."""
    return shlex.join(words_of(value)) or "none"


def _number(word: str) -> Any:
    """The number of a word; other words stay, for the check to refuse."""
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


_ESCAPES = {"\\n": "\n", "\\t": "\t", "\\r": "\r", "\\\\": "\\"}


def _unescape(text: str) -> str:
    return re.sub(r"\\[ntr\\]", lambda match: _ESCAPES[match[0]], text)


def _escape(text: str) -> str:
    for written, char in reversed(_ESCAPES.items()):
        text = text.replace(char, written)
    return text


# --- settings: the options of a request that commands and /set have -------------------------------

_SAMPLING = options_of(SamplingParams)
_REQUEST = options_of(Request)
SETTINGS: dict[str, Option] = {
    **{name: _REQUEST[name] for name in ("max_tokens", "stop")},
    "seed": _SAMPLING["seed"],
    **_SAMPLING,
}


def defaults(params: SamplingParams | None = None, **others: Any) -> Values:
    """The default of every setting.

    Args:
        params: the model's; else mlxrun's.
        others: settings with another default.
    """
    params = params or SamplingParams()
    sampling = {name: getattr(params, name) for name in _SAMPLING}
    values = {"max_tokens": MAX_TOKENS, "stop": (), **sampling, **others}
    return {name: values[name] for name in SETTINGS}


def chat_defaults(params: SamplingParams | None = None) -> Values:
    """The defaults of a chat, which does not show log-probabilities."""
    values = defaults(params, max_tokens=CHAT_MAX_TOKENS)
    del values["logprobs"]
    return values


def take_settings(options: Values) -> Values:
    """Take the settings out of a command's options; returns those that were given."""
    source = click.get_current_context().get_parameter_source
    values = {name: options.pop(name) for name in SETTINGS if name in options}
    return {n: value for n, value in values.items() if source(n) is not ParameterSource.DEFAULT}


def parse_settings(stored: Mapping[str, Any], known: Iterable[str]) -> Values:
    """Settings from JSON, checked.

    Args:
        known: names that may occur.
    """
    values: Values = {}
    for name, value in stored.items():
        if name not in known:
            raise ParameterError("a setting", name, f"one of {', '.join(known)}")
        words = value if isinstance(value, list) else [value]
        words = ["none" if word is None else str(word) for word in words]
        values[name] = parse(name, SETTINGS[name], words)
    return values


def store_settings(values: Values) -> Values:
    """Settings as JSON for :func:`parse_settings`."""
    return {n: words_of(v) if _is_many(SETTINGS[n]) else v for n, v in values.items()}


def _is_many(declared: Option) -> bool:
    return isinstance(declared.allowed, Strings | Biases)


# --- options of commands --------------------------------------------------------------------------


def with_options(
    declared: Mapping[str, Option],
    section: str,
    defaults: Mapping[str, str] = {},
    prefix: str = "",
) -> Callable[[Callback], Callback]:
    """Give a command the declared options.

    Args:
        defaults: in words, by name; else those of the declarations.
        prefix: before names and help, such as ``a`` for ``--a-policy``.
    """

    def decorate(command: Callback) -> Callback:
        for name, option in reversed(list(declared.items())):
            command = _click_option(name, option, section, defaults.get(name), prefix)(command)
        return command

    return decorate


def _click_option(
    name: str, declared: Option, section: str, default: str | None, prefix: str
) -> Callable[[Callback], Callback]:
    flag = "--" + "-".join([*filter(None, [prefix]), *name.split("_")])
    names = [declared.alias, flag] if declared.alias and not prefix else [flag]
    kwargs: dict[str, Any] = {"metavar": declared.metavar}
    if name == "adapter":
        kwargs |= {"multiple": True, "callback": _strengths}
    elif name == "wired" or isinstance(declared.allowed, Flag):
        kwargs = {"is_flag": True}
    elif isinstance(declared.allowed, OneOf) and not declared.metavar:
        words = [value for value in declared.allowed.values if isinstance(value, str)]
        kwargs = {"type": click.Choice(words) if words else int}
    else:
        kwargs |= {"multiple": _is_many(declared), "callback": partial(_parsed, name, declared)}
    if isinstance(declared.allowed, Written):
        known = declared.allowed.names
        kwargs["shell_complete"] = lambda *args: [n for n in known if n.startswith(args[-1])]
    text = f"Of {prefix.upper()}: {declared.help}" if prefix else declared.help
    text += " Repeatable." if _is_many(declared) else ""
    default = declared.default_help if default is None else default
    return click.option(
        *names,
        f"{prefix}_{name}" if prefix else name,
        cls=SectionedOption,
        section=section,
        help=f"{text}  [default: {default}]" if default else text,
        **kwargs,
    )


def _parsed(
    name: str,
    declared: Option,
    context: click.Context,
    parameter: click.Parameter,
    given: str | Sequence[str] | None,
) -> Any:
    """The value of an option, checked before anything is loaded; None if it is left out."""
    if given in (None, ()):
        return None
    try:
        return parse(name, declared, [given] if isinstance(given, str) else given)
    except ParameterError as error:
        raise click.BadParameter(str(error), context, parameter) from None


def with_settings(values: Values) -> Callable[[Callback], Callback]:
    """Give a command an option for each of some settings, with these defaults."""
    words = {
        name: ("the model's, else " if name in RECOMMENDABLE else "") + show(value)
        for name, value in values.items()
    }
    request = {name: SETTINGS[name] for name in values if name in _REQUEST}
    sampling = {name: SETTINGS[name] for name in values if name not in request}

    def decorate(command: Callback) -> Callback:
        command = with_options(sampling, "Sampling", words)(command)
        return with_options(request, "Options", words)(command)

    return decorate


_STORAGE = options_of(CacheConfig)
_CACHE_TYPES = {name: _STORAGE[name] for name in names_of(CacheTypeOptions)}
_LOADING = options_of(LoadConfig)

with_cache_types = with_options(_CACHE_TYPES, "KV cache")
with_attention = with_options({"attention": _STORAGE["attention"]}, "KV cache")
with_ignore_eos = with_options({"ignore_eos": _REQUEST["ignore_eos"]}, "Options")
with_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
with_verbose = click.option(
    "-v", "--verbose", is_flag=True, help="Print the choices made for this model and its cost."
)


def with_loading(command: Callback) -> Callback:
    return with_verbose(with_options(_LOADING, "Loading")(command))


def with_sides(command: Callback) -> Callback:
    """Give a command ``--a-policy``, ``--b-policy`` and so on, for a comparison of A and B."""
    options = {name: option for name, option in _LOADING.items() if name != "wired"} | _CACHE_TYPES
    for side in "ba":
        command = with_options(options, "Options", dict.fromkeys(options, ""), side)(command)
    return command


def with_generation(values: Values) -> Callable[[Callback], Callback]:
    """Give a command the options of loading a model and of answering, with these defaults."""

    def decorate(command: Callback) -> Callback:
        command = with_cache_types(with_attention(with_loading(command)))
        command = with_template_vars(with_settings(values)(command))
        return with_stats(with_think(command))

    return decorate


def take(options: Values, config: type[Any], prefix: str = "") -> Values:
    """Take the options of a config out of a command's, without ``prefix``."""
    names = [name for name in options_of(config) if prefix + name in options]
    return {name: options.pop(prefix + name) for name in names}


def with_merged_adapter(command: Callback) -> Callback:
    """Give a command ``--adapter`` for adapters that are merged, not applied."""
    declared = _LOADING["adapter"]
    merged = replace(declared, help=declared.help.replace("Apply", "Merge", 1))
    return with_options({"adapter": merged}, "Options")(command)


def _strengths(context: object, parameter: object, values: tuple[str, ...]) -> Adapters:
    return [_strength(value) for value in values]


def _strength(value: str) -> tuple[str, float]:
    path, _, scale = value.rpartition(":")
    try:  # a path may have a colon of its own
        return (path, float(scale)) if path and not Path(value).exists() else (value, 1.0)
    except (ValueError, OSError):  # no number; no path that the system would look at
        return value, 1.0


# Not of a request: how a chat shows its answers.
THINK = Option(
    OneOf(("show", "hide"), "show or hide"),
    "Whether a chat shows the model's thinking before its answer.",
    default_help="show on a terminal, hide elsewhere",
)
with_think = with_options({"think": THINK}, "Options")
with_stats = click.option(
    "--stats",
    is_flag=True,
    help="Show the cost of each answer: tokens, speed, time to the first one, peak memory.",
)


def _template_vars(ctx: click.Context, param: click.Parameter, words: Sequence[str]) -> Values:
    variables: Values = {}
    for word in words:
        name, separator, text = word.partition("=")
        if not separator or not name.isidentifier() or name == "messages":
            raise click.BadParameter(f"{word!r} names no variable of a template.", ctx, param)
        try:
            variables[name] = json.loads(text)
        except ValueError:
            variables[name] = text
    return variables


with_template_vars = click.option(
    "--template-var",
    "template",
    multiple=True,
    metavar="NAME=VALUE",
    callback=_template_vars,
    help="A variable for the chat template, such as enable_thinking=false; VALUE is JSON, or else "
    "text. Repeatable.",
)
