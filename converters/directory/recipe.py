"""What a user asks a conversion for: a form for all matrices, and others by pattern.

Knows forms and names of modules; knows nothing of weights.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from converters.errors import ConversionError
from converters.layout import DENSE, FIXED_MODES, FLOAT_BITS, Layout, affine, dense, fixed

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
MODES = ("affine", *FIXED_MODES)
DEFAULT_GROUP = 64
# A pattern for the modules that mixed recipes keep wider; see :func:`mixed`.
MIXED = "mixed"


@dataclass(frozen=True)
class Form:
    """A form that is asked for; the type of its scales is that of the checkpoint's floats.

    Attributes:
        mode: ``dense`` or a quantisation mode.
        bits, group_size: 0 when dense.
    """

    mode: str = DENSE
    bits: int = 0
    group_size: int = 0

    def layout(self, dtype: str) -> Layout:
        """The layout in a checkpoint whose floats are of ``dtype``."""
        if self.mode == DENSE:
            return dense(dtype)
        return (
            affine(self.bits, self.group_size, dtype) if self.mode == "affine" else fixed(self.mode)
        )

    def __str__(self) -> str:
        if self.mode == DENSE:
            return "float"
        return f"affine{self.bits} g{self.group_size}" if self.mode == "affine" else self.mode


FLOAT = Form()
EIGHT_BITS = Form("affine", 8, 64)


@dataclass(frozen=True)
class Recipe:
    """What becomes of every matrix.

    Attributes:
        form: of all modules that nothing else is said of; None keeps each as it is stored.
        keep: forms by pattern; the last that matches decides.
        dtype: of plain arrays and of scales; None for the half precision that the source suggests.
    """

    form: Form | None = None
    keep: Mapping[str, Form] = field(default_factory=dict)
    dtype: str | None = None

    def kept(self, modules: Collection[str]) -> dict[str, Form]:
        """The form of every module that a pattern names.

        Raises:
            ConversionError: a pattern names none.
        """
        layers = 1 + max((_layer(name) for name in modules), default=-1)
        tied = not any(name.endswith("lm_head") for name in modules)
        chosen: dict[str, Form] = {}
        for pattern, form in self.keep.items():
            matches = _matcher(pattern, layers)
            found = [name for name in modules if any(map(matches, _spellings(name, tied)))]
            if not found:
                raise _nothing(pattern, modules)
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
    """A recipe from what a user says.

    Args:
        bits: 2, 3, 4, 5, 6 or 8; by default a fixed mode's own, and without a mode none: floats
            stay floats.
        group_size: neighbours that share a scale: 32, 64 (default) or 128, or a fixed mode's own.
        mode: ``affine`` (default), ``mxfp4``, ``mxfp8`` or ``nvfp4``.
        keep: ``pattern=form`` entries, separated by commas; see :func:`parse_keep`.
        dtype: ``float16``, ``bfloat16`` or ``float32``.

    Raises:
        ConversionError: a value or a combination that does not exist.
    """
    if dtype is not None and dtype not in FLOAT_BITS:
        raise ConversionError(f"dtype must be one of {', '.join(FLOAT_BITS)}, not {dtype!r}")
    form = _form(bits, group_size, mode)
    default = form.group_size if form and form.mode == "affine" else DEFAULT_GROUP
    return Recipe(form, parse_keep(keep, default) if keep is not None else {}, dtype)


def _form(bits: int | None, group_size: int | None, mode: str | None) -> Form | None:
    if mode is not None and mode not in MODES:
        raise ConversionError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    if mode in FIXED_MODES:
        own_group, own_bits = FIXED_MODES[str(mode)]
        wanted = own_bits if bits is None else bits, own_group if group_size is None else group_size
        if wanted != (own_bits, own_group):
            raise ConversionError(
                f"{mode} has {own_bits} bits in groups of {own_group}, not "
                f"{wanted[0]} bits in groups of {wanted[1]}",
                hint="Leave out bits and group size, or choose mode affine",
            )
        return Form(str(mode), own_bits, own_group)
    if bits is None:
        if mode is not None or group_size is not None:
            raise ConversionError("a group size, or mode affine, needs bits as well")
        return None
    if bits not in BITS or isinstance(bits, bool):
        raise ConversionError(f"bits must be one of {_listed(BITS)}, not {bits!r}")
    group_size = DEFAULT_GROUP if group_size is None else group_size
    if group_size not in GROUPS:
        raise ConversionError(f"group size must be one of {_listed(GROUPS)}, not {group_size!r}")
    return Form("affine", bits, group_size)


def _listed(values: Collection[Any]) -> str:
    return ", ".join(map(str, values))


_FLOAT_NAMES = ("float", "16", "f16", "bf16", "half")
_FORM = re.compile(r"([0-9]+)(?:/([0-9]+))?")


def parse_keep(text: str, default_group: int = DEFAULT_GROUP) -> dict[str, Form]:
    """``pattern=form`` entries, separated by commas.

    A form is a number of bits (``6``), bits and group size (``6/32``), a mode (``mxfp8``) or
    ``float``. A pattern is a part of a module's name (``embed``, ``layers.0.``), or, where it has
    ``*`` or ``?``, its whole name (``*.mlp.gate``). A range of numbers stands for each of them
    (``layers.0-3.``), one without an end goes on to the last layer (``layers.28-.``). ``mixed``
    stands for the head and for values and down projections of every third layer and of the first
    and last eighth.

    Raises:
        ConversionError: an entry is of no such form.
    """
    entries: dict[str, Form] = {}
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


def _named_form(text: str, entry: str, default_group: int) -> Form:
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


def _spellings(module: str, tied: bool) -> tuple[str, ...]:
    """What a module may be called: a tied embedding is the head as well."""
    return (module, "lm_head") if tied and module.endswith(_EMBEDDINGS) else (module,)


_EMBEDDINGS = ("embed_tokens", "word_embeddings", "embeddings", "wte")
_NUMBER = re.compile(r"\.(\d+)\.")


def _layer(module: str) -> int:
    """The number of the layer that a module is in; -1 outside the layers."""
    number = _NUMBER.search(module)
    return int(number[1]) if number else -1


_RANGE = re.compile(r"(\d+)-(\d*)")


def _matcher(pattern: str, layers: int) -> Any:
    """A function that tells whether a name matches a pattern."""
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
    """Whether a module is one that mixed recipes store in more bits than the rest.

    The choice of llama.cpp's Q4_K_M, which mlx-lm's mixed recipes follow: the head, and values and
    down projections of the first and last eighth of the layers and of every third in between.
    """
    if module.endswith("lm_head"):
        return True
    index, eighth = _layer(module), layers // 8
    if index < 0 or not module.endswith(("v_proj", "v_a_proj", "v_b_proj", "down_proj")):
        return False
    return index < eighth or index >= 7 * layers // 8 or (index - eighth) % 3 == 2


# What llama-quantize calls modules, for those who bring its patterns along.
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


def _nothing(pattern: str, modules: Collection[str]) -> ConversionError:
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
