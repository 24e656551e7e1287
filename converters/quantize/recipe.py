"""What becomes of a directory's matrices: one form for all, and other forms by name pattern."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from converters.errors import ConversionError
from converters.quantize.layout import (
    BITS,
    DEFAULT_GROUP,
    FIXED_MODES,
    FLOAT_BITS,
    GROUPS,
    MODES,
    Layout,
    affine,
    dense,
    fixed,
)

# A pattern for the modules that mixed recipes keep wider; see :func:`mixed`.
MIXED = "mixed"
FLOAT = dense()
EIGHT_BITS = affine(8, 64)


@dataclass(frozen=True)
class Recipe:
    """What becomes of every matrix.

    Attributes:
        form: of modules that no pattern names; None keeps each as it is stored.
        keep: forms by pattern; the last that matches decides.
        dtype: of plain arrays and of scales; None for the source's own half precision.
    """

    form: Layout | None = None
    keep: Mapping[str, Layout] = field(default_factory=dict)
    dtype: str | None = None

    def named(self, modules: Collection[str]) -> dict[str, Layout]:
        """The forms of the modules that patterns name; ConversionError if one names none."""
        layers = 1 + max((_layer(name) for name in modules), default=-1)
        tied = not any(name.endswith("lm_head") for name in modules)
        chosen: dict[str, Layout] = {}
        for pattern, form in self.keep.items():
            matches = _matcher(pattern, layers)
            found = [name for name in modules if any(map(matches, _names(name, tied)))]
            if not found:
                raise _no_match(pattern, modules)
            chosen |= dict.fromkeys(found, form)
        return chosen

    def __str__(self) -> str:
        kept = ", ".join(f"{pattern}={form}" for pattern, form in self.keep.items())
        return f"{self.form or 'as stored'}{f', keep {kept}' if kept else ''}"


def recipe(
    bits: int | None = None,
    group_size: int | None = None,
    mode: str | None = None,
    keep: str | None = None,
    dtype: str | None = None,
) -> Recipe:
    """A recipe from the options of a conversion.

    Args:
        bits: 2, 3, 4, 5, 6 or 8; by default a fixed mode's own, and without a mode none: floats
            stay floats.
        group_size: neighbors that share a scale: 32, 64 (default) or 128, or a fixed mode's own.
        mode: ``affine`` (default), ``mxfp4``, ``mxfp8`` or ``nvfp4``.
        keep: ``pattern=form`` entries, separated by commas; see :func:`parse_keep`.
        dtype: ``float16``, ``bfloat16`` or ``float32``.

    Raises:
        ConversionError: there is no such value or combination.
    """
    if dtype is not None and dtype not in FLOAT_BITS:
        raise ConversionError(f"dtype must be one of {', '.join(FLOAT_BITS)}, not {dtype!r}")
    form = _form(bits, group_size, mode)
    default = form.group_size if form and form.mode == "affine" else DEFAULT_GROUP
    return Recipe(form, parse_keep(keep, default) if keep is not None else {}, dtype)


def _form(bits: int | None, group_size: int | None, mode: str | None) -> Layout | None:
    if mode is not None and mode not in MODES:
        raise ConversionError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    if mode in FIXED_MODES:
        own_group, own_bits = FIXED_MODES[str(mode)]
        asked = own_bits if bits is None else bits, own_group if group_size is None else group_size
        if asked != (own_bits, own_group):
            raise ConversionError(
                f"{mode} has {own_bits} bits in groups of {own_group}, not "
                f"{asked[0]} bits in groups of {asked[1]}",
                hint="Leave out bits and group size, or choose mode affine",
            )
        return fixed(str(mode))
    if bits is None:
        if mode is not None or group_size is not None:
            raise ConversionError("a group size, or mode affine, needs bits as well")
        return None
    if bits not in BITS or isinstance(bits, bool):
        raise ConversionError(f"bits must be one of {_listed(BITS)}, not {bits!r}")
    group_size = DEFAULT_GROUP if group_size is None else group_size
    if group_size not in GROUPS:
        raise ConversionError(f"group size must be one of {_listed(GROUPS)}, not {group_size!r}")
    return affine(bits, group_size)


def _listed(values: Collection[Any]) -> str:
    return ", ".join(map(str, values))


_FLOAT_NAMES = ("float", "16", "f16", "bf16", "half")
_FORM = re.compile(r"([0-9]+)(?:/([0-9]+))?")


def parse_keep(text: str, default_group: int = DEFAULT_GROUP) -> dict[str, Layout]:
    """``pattern=form`` entries, separated by commas.

    A form is a number of bits (``6``), bits and group size (``6/32``), a mode (``mxfp8``) or
    ``float``. A pattern is a part of a module's name (``embed``, ``layers.0.``), or, where it has
    ``*`` or ``?``, its whole name (``*.mlp.gate``). A range stands for each number in it
    (``layers.0-3.``, or ``layers.28-.`` to the last layer). ``mixed`` names what :func:`mixed`
    does.
    """
    entries: dict[str, Layout] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        pattern, equals, form = (part.strip() for part in entry.rpartition("="))
        if not (pattern and equals and form):
            raise ConversionError(
                f"keep has {entry!r}, which is not pattern=form", hint="For example lm_head=8"
            )
        entries.pop(pattern, None)  # the last one decides
        entries[pattern] = _named_form(form, entry, default_group)
    if not entries:
        raise ConversionError("keep is empty", hint="For example lm_head=8,embed=8")
    return entries


def _named_form(text: str, entry: str, default_group: int) -> Layout:
    if text in _FLOAT_NAMES:
        return FLOAT
    if text in FIXED_MODES:
        return _form(None, None, text) or FLOAT
    numbers = _FORM.fullmatch(text)
    if not numbers:
        raise ConversionError(
            f"keep has {entry!r}: {text!r} is no form",
            hint=f"A form is bits ({_listed(BITS)}), bits/group such as 6/32, "
            f"{', '.join(FIXED_MODES)} or float",
        )
    try:
        return _form(int(numbers[1]), int(numbers[2] or default_group), "affine") or FLOAT
    except ConversionError as error:
        raise ConversionError(f"keep has {entry!r}: {error.message}") from error


def _names(module: str, tied: bool) -> tuple[str, ...]:
    """Names that patterns match: a tied embedding is the head as well."""
    return (module, "lm_head") if tied and module.endswith(_EMBEDDINGS) else (module,)


_EMBEDDINGS = ("embed_tokens", "word_embeddings", "embeddings", "wte")
_NUMBER = re.compile(r"\.(\d+)\.")


def _layer(module: str) -> int:
    """A module's layer; -1 outside the layers."""
    number = _NUMBER.search(module)
    return int(number[1]) if number else -1


_RANGE = re.compile(r"(\d+)-(\d*)")


def _matcher(pattern: str, layers: int) -> Callable[[str], bool]:
    if pattern == MIXED:
        return lambda name: mixed(name, layers)
    whole = any(character in pattern for character in "*?")
    parts, end = [], 0
    for found in _RANGE.finditer(pattern):
        parts += [_glob(pattern[end : found.start()]), r"(\d+)"]
        end = found.end()
    expression = re.compile("".join([*parts, _glob(pattern[end:])]))
    bounds = [
        (int(first), int(last) if last else layers) for first, last in _RANGE.findall(pattern)
    ]

    def matches(name: str) -> bool:
        found = expression.fullmatch(name) if whole else expression.search(name)
        return found is not None and all(
            first <= int(number) <= last
            for number, (first, last) in zip(found.groups(), bounds, strict=True)
        )

    return matches


def _glob(text: str) -> str:
    return re.escape(text).replace(r"\*", ".*").replace(r"\?", ".")


def mixed(module: str, layers: int) -> bool:
    """Whether mixed recipes store a module in more bits than the rest.

    As llama.cpp's Q4_K_M and mlx-lm: the head, and values and down projections of the first and
    last eighth of the layers and of every third in between.
    """
    if module.endswith("lm_head"):
        return True
    index, eighth = _layer(module), layers // 8
    if index < 0 or not module.endswith(("v_proj", "v_a_proj", "v_b_proj", "down_proj")):
        return False
    return index < eighth or index >= 7 * layers // 8 or (index - eighth) % 3 == 2


# llama-quantize's names of modules, which users may bring along.
_LLAMA_CPP = {
    "token_embd": "embed_tokens",
    "output": "lm_head",
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_output": "o_proj",
    "ffn_gate": "gate_proj",
    "ffn_up": "up_proj",
    "ffn_down": "down_proj",
    "ffn_gate_inp": "mlp.gate",
}


def _no_match(pattern: str, modules: Collection[str]) -> ConversionError:
    message = f"keep has a pattern {pattern!r} that no module's name matches"
    if pattern in _LLAMA_CPP:
        return ConversionError(f"{message}; llama.cpp's {pattern} is {_LLAMA_CPP[pattern]} here")
    tails = {name.rpartition(".")[2]: name for name in sorted(modules)}
    near = get_close_matches(pattern, [*tails, *sorted(modules)], n=1, cutoff=0.0)
    nearest = f"the nearest is {tails.get(near[0], near[0])}" if near else "there is none"
    return ConversionError(
        f"{message}; {nearest}",
        hint="A pattern is a part of a name, or the whole name with * and ?",
    )
