"""A skeleton, ``skeletons/NAME.json``, as a GGUF file: the same on every machine.

Knows how keys, tensors and random values are written down (``README.md`` has the format); knows
nothing of architectures, of llama.cpp or of mlxrun.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import gguf
import numpy as np

HERE = Path(__file__).resolve().parent
SKELETONS, LOGITS = HERE / "skeletons", HERE / "logits"
FIRST_TOKEN = 3  # after <unk>, <s> and </s>

Rule = Mapping[str, Any]
_Value = gguf.GGUFValueType
_KINDS = {
    "u8": _Value.UINT8, "i8": _Value.INT8, "u16": _Value.UINT16, "i16": _Value.INT16,
    "u32": _Value.UINT32, "i32": _Value.INT32, "u64": _Value.UINT64, "i64": _Value.INT64,
    "f32": _Value.FLOAT32, "f64": _Value.FLOAT64, "bool": _Value.BOOL, "str": _Value.STRING,
}  # fmt: skip
_STORED = {"F32": np.float32, "F16": np.float16, "I32": np.int32}

#: The distribution of values unless a skeleton sets it: the first pattern that fits a name.
#: Norms stay near one, projections keep the variance, what is added is small, states decay.
DEFAULT_VALUES: dict[str, Rule] = {
    "*norm*.weight": {"normal": [1, 0.1]},
    "token_embd.weight": {"normal": [0, 0.5]},
    "rope_f*": {"log": [1, 4]},
    "*.ssm_a": {"log": [-0.1, -2]},
    "*.ssm_d": {"normal": [1, 0.1]},
    "*.ssm_dt.bias": {"uniform": [-4, 0]},
    "*.attn_sinks.*": {"normal": [0, 1]},
    "*.exp_probs_b.bias": {"normal": [0, 0.2]},
}


class SkeletonError(ValueError):
    """A skeleton does not say what it should."""


@dataclass(frozen=True)
class Skeleton:
    """One small model.

    Attributes:
        name: of its file.
        arch: ``general.architecture``.
        keys: metadata; names without a namespace are the architecture's.
        tensors: shapes by name or by a pattern over layers.
        values: their distribution, by pattern; before :data:`DEFAULT_VALUES`.
        seed: of the values and of the tokens.
        tokens: how many there are.
        about: what this one shows, for readers.
    """

    name: str
    arch: str
    keys: Mapping[str, Any]
    tensors: Mapping[str, list[Any]]
    values: Mapping[str, Rule] = field(default_factory=dict)
    seed: int = 0
    tokens: int = 64
    about: str = ""

    @property
    def vocabulary(self) -> int:
        """How many pieces there are: rows of the embedding."""
        return int(self.shapes()["token_embd.weight"][1][0])

    def token_ids(self) -> list[int]:
        """What to feed: seeded ids without the special ones."""
        rng = np.random.default_rng([self.seed, zlib.crc32(b"tokens")])
        return [int(t) for t in rng.integers(FIRST_TOKEN, self.vocabulary, self.tokens)]

    def digest(self) -> str:
        """Changes with everything that logits depend on."""
        parts = (self.arch, self.keys, self.tensors, self.values, self.seed, self.tokens)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape (last axis contiguous) of every tensor, in the order of the file."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        for pattern, shape in self.tensors.items():
            kind = shape[0] if isinstance(shape[0], str) else "F32"
            for name in self.expand(pattern):
                if name in found:
                    raise SkeletonError(f"{self.name}: {name} is there twice; see {pattern}")
                found[name] = kind, tuple(n for n in shape if not isinstance(n, str))
        return found

    def expand(self, pattern: str) -> Iterator[str]:
        """Names of the tensors of ``blk.*.x``, ``blk.0,2-4.x`` or of a plain name."""
        match = re.fullmatch(r"blk\.([*0-9,-]+)\.(.+)", pattern)
        if not match:
            yield pattern
            return
        for part in match[1].split(","):
            first, _, last = part.partition("-")
            layers = (
                range(self.keys["block_count"])
                if part == "*"
                else range(int(first), int(last or first) + 1)
            )
            yield from (f"blk.{layer}.{match[2]}" for layer in layers)

    def value(self, name: str, kind: str, shape: tuple[int, ...]) -> np.ndarray:
        """Seeded values of one tensor."""
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        for pattern, rule in [*self.values.items(), *DEFAULT_VALUES.items()]:
            if fnmatchcase(name, pattern):
                return random_values(rule, shape, rng).astype(_STORED[kind])
        rule = {"normal": [0, 0.1]} if len(shape) == 1 else {"gain": 1}
        return random_values(rule, shape, rng).astype(_STORED[kind])

    def write(self, path: Path, zero: str | None = None) -> Path:
        """Write the GGUF file.

        Args:
            zero: a pattern of ``tensors`` whose values are to be zero.
        """
        writer = gguf.GGUFWriter(path, self.arch)
        defaults = {"context_length": 512, "vocab_size": self.vocabulary}
        for key, value in {**defaults, **self.keys, **vocabulary(self.vocabulary)}.items():
            whole = key.startswith(("general.", "tokenizer.", "xielu.", f"{self.arch}."))
            _add_key(writer, key if whole else f"{self.arch}.{key}", value)
        zeroed = set(self.expand(zero)) if zero else set()
        for name, (kind, shape) in self.shapes().items():
            value = self.value(name, kind, shape)
            writer.add_tensor(name, np.zeros_like(value) if name in zeroed else value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def random_values(rule: Rule, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Values as a rule of ``README.md`` says, float64."""
    ((kind, given),) = rule.items()
    if kind == "constant":
        return np.full(shape, float(given))
    if kind == "list":
        return np.array(given, float).reshape(shape)
    if kind == "gain":  # keeps the variance of what it multiplies, times the square of the gain
        return float(given) * rng.standard_normal(shape) / np.sqrt(shape[-1])
    low, high = given
    if kind == "normal":  # mean and standard deviation
        return low + high * rng.standard_normal(shape)
    if kind == "uniform":
        return rng.uniform(low, high, shape)
    if kind == "log":  # uniform in the logarithm, of either sign
        return np.sign(low) * np.exp(rng.uniform(np.log(abs(low)), np.log(abs(high)), shape))
    if kind == "integer":
        return rng.integers(low, high, shape).astype(np.float64)
    raise SkeletonError(f"no such rule: {rule}")


def _add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kind = None
    if isinstance(value, dict):
        ((kind, value),) = value.items()
    sample = value[0] if isinstance(value, list) else value
    item = _KINDS[kind] if kind else _kind_of(sample)
    if isinstance(value, list):
        writer.add_key_value(key, value, _Value.ARRAY, item)
    else:
        writer.add_key_value(key, value, item)


def _kind_of(value: Any) -> gguf.GGUFValueType:
    if isinstance(value, int) and not isinstance(value, bool):
        return _Value.UINT32 if value >= 0 else _Value.INT32
    return {bool: _Value.BOOL, float: _Value.FLOAT32, str: _Value.STRING}[type(value)]


def vocabulary(size: int) -> dict[str, Any]:
    """A sentencepiece vocabulary of this many pieces."""
    pieces = ["<unk>", "<s>", "</s>", "<0x0A>", *map(chr, range(0x21, 0x7F)), "▁"]
    pieces += [f"▁{i}" for i in range(size - len(pieces))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": pieces[:size],
        "tokenizer.ggml.scores": {"f32": [-float(i) for i in range(size)]},
        "tokenizer.ggml.token_type": {"i32": [2, 3, 3, 6, *[1] * (size - 4)]},
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def names() -> list[str]:
    """Every skeleton there is."""
    return sorted(path.stem for path in SKELETONS.glob("*.json"))


def read(name: str) -> Skeleton:
    """The skeleton of a name.

    Raises:
        SkeletonError: there is none, or it has a part that skeletons do not have.
    """
    path = SKELETONS / f"{name}.json"
    if not path.is_file():
        raise SkeletonError(f"no skeleton {name}: write {path}")
    try:
        return Skeleton(name, **json.loads(path.read_text()))
    except (json.JSONDecodeError, TypeError) as error:
        raise SkeletonError(f"{path.name}: {error}") from None


def expected(skeleton: Skeleton) -> np.ndarray:
    """llama.cpp's logits (T, V) of a skeleton.

    Raises:
        SkeletonError: there are none, or they are of an earlier skeleton.
    """
    path = LOGITS / f"{skeleton.name}.npz"
    again = f"run: python -m tests.conformance.make {skeleton.name}"
    if not path.is_file():
        raise SkeletonError(f"{skeleton.name} has no logits; {again}")
    with np.load(path) as data:
        if str(data["skeleton"]) != skeleton.digest():
            raise SkeletonError(f"{skeleton.name} has changed since its logits were made; {again}")
        return data["logits"].astype(np.float64)
