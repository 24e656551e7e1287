"""One table of what a user may set: the options of ``generate`` and ``chat``, and chat's ``/set``.

Every name is a keyword of ``LLM.stream``. A value is checked by the class that owns it
(``SamplingParams`` or ``Request``), so that ranges are written down once. Standard library and
click only.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import click

from mlxrun.cli.counts import number
from mlxrun.cli.sections import option_in
from mlxrun.errors import ParameterError
from mlxrun.outputs import Request, SamplingParams
from mlxrun.sampling_defaults import RECOMMENDABLE, SamplingDefaults

Values = dict[str, Any]
Command = Callable[..., None]


@dataclass(frozen=True)
class Setting:
    """One knob.

    Attributes:
        name: keyword of ``LLM.stream``.
        metavar: what its value looks like.
        help: what it does, in a phrase.
        parse: from the words that a user wrote; what cannot be parsed is passed on as it is, for
            the check to refuse.
        many: whether it takes several words (and the option may be repeated).
        alias: a second spelling of the option.
    """

    name: str
    metavar: str
    help: str
    parse: Callable[[Sequence[str]], Any]
    many: bool = False
    alias: str = ""

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

    def read(self, words: Sequence[str]) -> Any:
        """The value of what a user wrote.

        Raises:
            ParameterError: it is not in the allowed range; the message names the range.
        """
        if not self.many and len(words) != 1:
            raise ParameterError(self.name, " ".join(words), "one value")
        value = self.parse(words)
        owner: Any = SamplingParams if self.name in _SAMPLING else _check_request
        return getattr(owner(**{self.name: value}), self.name)

    def words(self, value: Any) -> list[str]:
        """A value as a user would write it: the inverse of ``read``."""
        if value is None:
            return ["none"]
        if isinstance(value, Mapping):
            return [f"{key}={_digits(number)}" for key, number in value.items()]
        if isinstance(value, tuple):
            return [_escape(text) for text in value]
        return [_digits(value)]

    def show(self, value: Any) -> str:
        """A value on one line, as ``/set`` takes it."""
        return shlex.join(self.words(value)) or "none"


def _check_request(**values: Any) -> Request:
    return Request((0,), **values)


def _digits(number: float) -> str:
    return repr(number).removesuffix(".0")


def _number(words: Sequence[str]) -> Any:
    for kind in (int, float):
        try:
            return kind(words[0])
        except ValueError:
            continue
    return words[0]


def _optional(words: Sequence[str]) -> Any:
    return None if words[0].lower() in ("none", "random") else _number(words)


def _tokens(words: Sequence[str]) -> Any:
    count = number(words[0])
    return _optional(words) if count is None else count


def _none(words: Sequence[str]) -> bool:
    return [word.lower() for word in words] in ([], ["none"])


def _strings(words: Sequence[str]) -> Any:
    return () if _none(words) else tuple(map(_unescape, words))


def _biases(words: Sequence[str]) -> Any:
    biases = {}
    for word in () if _none(words) else words:
        token, _, bias = word.partition("=")
        biases[_number([token])] = _number([bias])
    return biases


_ESCAPES = {"\\n": "\n", "\\t": "\t", "\\r": "\r", "\\\\": "\\"}


def _unescape(text: str) -> str:
    return re.sub(r"\\[ntr\\]", lambda match: _ESCAPES[match[0]], text)


def _escape(text: str) -> str:
    for written, meant in reversed(_ESCAPES.items()):
        text = text.replace(meant, written)
    return text


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("max_tokens", "N", "The most tokens to generate; none: up to a full context.",
                _tokens, alias="-n"),
        Setting("stop", "TEXT", "Text that ends the reply and is no part of it; \\n is a newline.",
                _strings, many=True),
        Setting("seed", "N", "The same seed gives the same text; none: another one each time.",
                _optional),
        Setting("temperature", "X", "How much is left to chance; 0 takes the likeliest token.",
                _number, alias="--temp"),
        Setting("top_k", "N", "Choose among the N likeliest tokens; 0: all.", _number),
        Setting("top_p", "X", "Choose among the likeliest that add up to X; 1: all.", _number),
        Setting("min_p", "X", "Leave out what is less likely than X times the likeliest; 0: off.",
                _number),
        Setting("typical_p", "X", "Choose among the least surprising for the entropy; 1: all.",
                _number),
        Setting("xtc_probability", "X", "How often XTC drops the top choices; 0: never.", _number),
        Setting("xtc_threshold", "X", "The probability that makes a top choice.", _number),
        Setting("dry_multiplier", "X", "Strength of DRY against repetition; 0: off.", _number),
        Setting("dry_base", "X", "DRY grows by this with each repeated token.", _number),
        Setting("dry_allowed_length", "N", "Shorter repetitions cost nothing.", _number),
        Setting("dry_penalty_last_n", "N", "How far back DRY looks, in tokens; -1: all.", _tokens),
        Setting("dry_sequence_breakers", "TEXT", "Text across which DRY sees no repetition.",
                _strings, many=True),
        Setting("mirostat", "0|2", "2: mirostat instead of the truncations above.", _number),
        Setting("mirostat_tau", "X", "The surprise that mirostat aims at, in bits.", _number),
        Setting("mirostat_eta", "X", "How fast mirostat steers.", _number),
        Setting("repetition_penalty", "X", "Make recent tokens less likely; 1: off.", _number),
        Setting("presence_penalty", "X", "Taken off the logit of each recent token.", _number),
        Setting("frequency_penalty", "X", "Taken off once for each time it occurred.", _number),
        Setting("penalty_last_n", "N", "How many tokens are recent; -1: all.", _tokens),
        Setting("logit_bias", "ID=X", "Add X to a token's logit; -inf bans it.",
                _biases, many=True),
        Setting("logprobs", "N", "Report the N likeliest tokens at each place (--json).", _number),
    )
}  # fmt: skip

_SAMPLING = tuple(field.name for field in fields(SamplingParams))


def defaults(params: SamplingParams | None = None, **others: Any) -> Values:
    """The value of every setting where the user gives none.

    Args:
        params: a model's own; else mlxrun's.
        others: settings that have another default.
    """
    params = params or SamplingParams()
    sampling = {name: getattr(params, name) for name in _SAMPLING}
    values = {"max_tokens": 512, "stop": (), **sampling, **others}
    return {name: values[name] for name in SETTINGS}


def chat_defaults(params: SamplingParams | None = None) -> Values:
    """The same for a chat, which has no use for log-probabilities and wants whole replies."""
    values = defaults(params, max_tokens=2048)
    del values["logprobs"]
    return values


def origin(name: str, value: Any, model: SamplingDefaults) -> str:
    """Whose a setting of a chat is: ``"yours"``, or whose default it is."""
    default = chat_defaults(model.params)[name]
    return model.origin(name) if value == default else "yours"


class _Value(click.ParamType[list[str]]):
    """A setting's value on the command line, checked before anything is loaded."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.name = setting.metavar

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[str]:
        try:
            self.setting.read([value])
        except ParameterError as error:
            self.fail(str(error), param, ctx)
        return [value]


def with_settings(values: Values) -> Callable[[Command], Command]:
    """Give a command an option for each of some settings, and tell their default values."""

    def decorate(command: Command) -> Command:
        for name in reversed(values):
            command = _option(SETTINGS[name], values[name])(command)
        return command

    return decorate


def _option(setting: Setting, default: Any) -> Callable[[Command], Command]:
    spellings = [name for name in (setting.alias, setting.option) if name]
    repeatable = " Repeatable." if setting.many else ""
    whose = "the model's, else " if setting.name in RECOMMENDABLE else ""
    return option_in("Sampling" if setting.name in _SAMPLING else "Options")(
        *spellings,
        setting.name,
        type=_Value(setting),
        metavar=setting.metavar,
        multiple=setting.many,
        help=f"{setting.help}{repeatable}  [default: {whose}{setting.show(default)}]",
    )


def with_template_vars(command: Command) -> Command:
    """Give a command ``--template-var``; it gets a mapping as ``template``."""
    return click.option(
        "--template-var",
        "template",
        multiple=True,
        metavar="NAME=VALUE",
        callback=_template_vars,
        help="A variable for the chat template, such as enable_thinking=false; VALUE is JSON, or "
        "else text. Repeatable.",
    )(command)


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


def given(options: Mapping[str, Any]) -> Values:
    """What the command line set, out of all its options."""
    values: Values = {}
    for name, setting in SETTINGS.items():
        words = options.get(name)
        if words:
            values[name] = setting.read(_flat(words) if setting.many else words)
    return values


def _flat(lists: Iterable[Sequence[str]]) -> list[str]:
    return [word for words in lists for word in words]


def parse_settings(stored: Mapping[str, Any], known: Iterable[str]) -> Values:
    """Settings from JSON, checked.

    Args:
        known: the names that may be there.

    Raises:
        ParameterError: a name that is none, or a value outside its range.
    """
    values: Values = {}
    for name, value in stored.items():
        if name not in known:
            raise ParameterError("a setting", name, f"one of {', '.join(known)}")
        words = value if isinstance(value, list) else [value]
        values[name] = SETTINGS[name].read(["none" if w is None else str(w) for w in words])
    return values


def store_settings(values: Values) -> dict[str, Any]:
    """Settings as JSON: what ``parse_settings`` reads."""
    return {
        name: SETTINGS[name].words(value) if SETTINGS[name].many else value
        for name, value in values.items()
    }
