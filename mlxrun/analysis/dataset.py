"""A data set's prompts and outputs: their lengths in tokens, and benchmarks to recommend.

A line of the file is a JSON object with one of these, the first that it has:

* ``messages`` or ``conversations``: turns in order, each ``{"role", "content"}`` or, as ShareGPT
  has them, ``{"from", "value"}``. Every answer of the assistant is an output, the turns before it
  are its prompt; a last turn of the user is a prompt without an output.
* ``prompt``, ``instruction`` (with ``input`` below it, as Alpaca has it), ``input`` or
  ``question``: a text, or messages; and, optionally, ``response``, ``completion``, ``output`` or
  ``answer``.

A text is a string or a list of parts ``{"text": ...}``.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxrun.bench.workloads import Decode, Prefill, Workload
from mlxrun.errors import DatasetError, TemplateError

if TYPE_CHECKING:
    from mlxrun.tokenizer.tokenizer import Tokenizer

Message = Mapping[str, str]

# A line may hold a book, but a file without lines is no such file.
LONGEST_LINE = 1 << 26

_TURNS = ("messages", "conversations")
_PROMPTS = ("prompt", "instruction", "input", "question")
_OUTPUTS = ("response", "completion", "output", "answer")
_ROLES = {
    **{name: name for name in ("system", "user", "assistant", "tool")},
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    "human": "user",
    "developer": "system",
}

PERCENTILES = (50, 75, 90, 95, 99)
# Per cent of prompts, and of outputs, that a benchmark covers.
LEVELS: Mapping[str, int] = {"conservative": 75, "recommended": 90, "comprehensive": 99}
# A shorter test measures its start rather than a rate.
SHORTEST = 16
# Interactive sequences: each keeps this part of the rate of one alone.
INTERACTIVE = 0.5
# Offline sequences: together they reach this part of the best rate.
OFFLINE = 0.9
# Numbers of sequences to try, and tokens that each samples.
TRIED, TRIED_TOKENS = (1, 2, 4, 8, 16, 32), 32


@dataclass(frozen=True)
class Exchange:
    """A prompt, as a conversation, and its output, if the file has one."""

    line: int  # from 1
    messages: tuple[Message, ...]
    output: str | None


class _Malformed(ValueError):  # noqa: N818 - becomes a DatasetError where the line is known
    """A line is malformed."""


def read(path: Path, most: int) -> tuple[list[Exchange], int]:
    """A uniform sample of at most ``most`` of a file's exchanges, and the number of all."""
    found, count = sample(exchanges(path), most)
    if all(exchange.output is None for exchange in found):
        missing = "output" if found else "prompt"
        raise DatasetError(path, None, f"there is no {missing} in it")
    return found, count


def sample(found: Iterable[Exchange], most: int, seed: int = 0) -> tuple[list[Exchange], int]:
    """A uniform sample of at most ``most`` exchanges, in order, and the number of all.

    Vitter's Algorithm R ("Random sampling with a reservoir", 1985): one pass, bounded memory.
    """
    rng, count = random.Random(seed), 0
    reservoir: list[tuple[int, Exchange]] = []
    for count, exchange in enumerate(found, 1):
        if len(reservoir) < most:
            reservoir.append((count, exchange))
        elif (place := rng.randrange(count)) < most:
            reservoir[place] = (count, exchange)
    return [exchange for _, exchange in sorted(reservoir, key=lambda pair: pair[0])], count


def exchanges(path: Path) -> Iterator[Exchange]:
    """Exchanges of a file, in order; a conversation without a user's turn has none."""
    for number, line in _lines(path):
        if number == 1 and line.startswith("["):
            hint = "Write one object a line, as jq -c '.[]' does"
            raise DatasetError(path, number, "a list, not an object on each line", hint=hint)
        try:
            yield from _exchanges(number, _object(line))
        except _Malformed as error:
            raise DatasetError(path, number, str(error)) from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, with their numbers."""
    number = 0
    try:
        with path.open("rb") as file:
            while raw := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(raw) > LONGEST_LINE:
                    raise DatasetError(path, number, f"longer than {LONGEST_LINE >> 20} MiB")
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if line:
                    yield number, line
    except UnicodeDecodeError as error:
        raise DatasetError(path, number, f"byte {error.start + 1} of it is no UTF-8") from None
    except OSError as error:
        raise DatasetError(path, None, error.strerror or str(error)) from None


def _object(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise _Malformed(f"no JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise _Malformed("no JSON: nested too deeply") from None
    except ValueError:
        raise _Malformed("no JSON: a number that is too long") from None
    if not isinstance(record, dict):
        raise _Malformed(f"{_kind(record)}, not an object")
    return record


def _exchanges(line: int, record: Mapping[str, Any]) -> Iterator[Exchange]:
    for turns in _TURNS:
        if turns in record:
            yield from _conversation(line, _messages(record[turns], turns))
            return
    name = next((name for name in _PROMPTS if name in record), None)
    if name is None:
        names = ", ".join(sorted(map(str, record))[:8]) or "none"
        expected = ", ".join(_TURNS + _PROMPTS)
        raise _Malformed(f"no prompt: expected {expected}; found the fields {names}")
    yield Exchange(line, _prompt(record, name), _output(record))


def _conversation(line: int, messages: tuple[Message, ...]) -> Iterator[Exchange]:
    asked = False
    for place, message in enumerate(messages):
        if message["role"] == "assistant" and asked and message["content"]:
            yield Exchange(line, messages[:place], message["content"])
        asked = asked or message["role"] == "user"
    if messages and messages[-1]["role"] == "user":
        yield Exchange(line, messages, None)


def _prompt(record: Mapping[str, Any], name: str) -> tuple[Message, ...]:
    value = record[name]
    if _are_turns(value):
        return _messages(value, name)
    text = _text(value, name)
    if name == "instruction" and record.get("input"):
        text = f"{text}\n\n{_text(record['input'], 'input')}"
    return ({"role": "user", "content": text},)


def _output(record: Mapping[str, Any]) -> str | None:
    for name in _OUTPUTS:
        value = record.get(name)
        if _are_turns(value):
            return "".join(message["content"] for message in _messages(value, name))
        if value is not None:
            return _text(value, name)
    return None


def _messages(turns: Any, name: str) -> tuple[Message, ...]:
    if not isinstance(turns, list):
        raise _Malformed(f"{name}: {_kind(turns)}, not a list of messages")
    return tuple(_message(turn, f"{name}[{place}]") for place, turn in enumerate(turns))


def _message(turn: Any, where: str) -> Message:
    if not _is_turn(turn):
        raise _Malformed(f"{where}: no message with role and content, or from and value")
    role = turn["role"] if "role" in turn else turn["from"]
    known = _ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        raise _Malformed(f"{where}: the role {role!r} is none of {', '.join(_ROLES)}")
    content = turn["content"] if "content" in turn else turn.get("value")
    return {"role": known, "content": "" if content is None else _text(content, where)}


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and ("role" in value or "from" in value)


def _are_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_turn, value))


def _text(value: Any, where: str) -> str:
    """A text, or the texts of a list of parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        texts = [part.get("text", "") for part in value]
        if all(isinstance(text, str) for text in texts):
            return "".join(texts)
    raise _Malformed(f"{where}: {_kind(value)}, not a text")


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "a truth value"}
    return "null" if value is None else kinds.get(type(value), "a number")


@dataclass(frozen=True)
class Lengths:
    """Tokens of the prompt of each exchange, and of its output, if it has one."""

    prompts: Sequence[int]
    outputs: Sequence[int | None]

    @property
    def known_outputs(self) -> list[int]:
        return [length for length in self.outputs if length is not None]

    def covered(self, prompt: int, output: int) -> float:
        """The share of complete exchanges that are no longer in prompt and in output."""
        pairs = [(p, o) for p, o in zip(self.prompts, self.outputs, strict=True) if o is not None]
        return sum(p <= prompt and o <= output for p, o in pairs) / len(pairs)


def summary(lengths: Sequence[int]) -> dict[str, Any]:
    """Number, mean, maximum and percentiles of at least one length."""
    return {
        "count": len(lengths),
        "mean": statistics.fmean(lengths),
        "longest": max(lengths),
        "percentiles": {percent: percentile(lengths, percent) for percent in PERCENTILES},
    }


def percentile(lengths: Sequence[int], percent: int) -> int:
    """The least length that ``percent`` of them do not exceed: the nearest rank."""
    rank = -(-percent * len(lengths) // 100)
    return sorted(lengths)[max(rank, 1) - 1]


def token_lengths(
    path: Path,
    exchanges: Sequence[Exchange],
    tokenizer: Tokenizer,
    progress: Callable[[int, int], None] | None = None,
) -> Lengths:
    """Tokens of prompts through the chat template, and of outputs without an end of turn."""
    prompts, outputs = [], []
    for done, exchange in enumerate(exchanges, 1):
        try:
            prompts.append(len(tokenizer.encode_chat(exchange.messages)))
        except TemplateError as error:
            raise DatasetError(path, exchange.line, error.message, hint=error.hint) from error
        text = exchange.output
        outputs.append(None if text is None else len(tokenizer.encode(text, add_special=False)))
        if progress:
            progress(done, len(exchanges))
    return Lengths(prompts, outputs)


@dataclass(frozen=True)
class Size:
    """Lengths of a benchmark that covers so much of a data set."""

    level: str
    percent: int  # of prompts that ``prompt`` covers, and of outputs that ``predict`` covers
    prompt: int  # tokens, a power of two
    predict: int
    both: float  # share of exchanges whose prompt and output are both covered

    @property
    def length(self) -> int:
        return self.prompt + self.predict


def benchmark_length(length: int) -> int:
    """The next power of two, at least SHORTEST."""
    return max(SHORTEST, 1 << (length - 1).bit_length())


def sizes(lengths: Lengths) -> list[Size]:
    """Benchmark lengths for each level, of at least one prompt and output."""
    made = []
    for level, percent in LEVELS.items():
        prompt = benchmark_length(percentile(lengths.prompts, percent))
        predict = benchmark_length(percentile(lengths.known_outputs, percent))
        made.append(Size(level, percent, prompt, predict, lengths.covered(prompt, predict)))
    return made


@dataclass(frozen=True)
class Workers:
    """Sequences at once: where each has a user who waits, and where only the total counts."""

    interactive: int
    offline: int


def workers(rates: Mapping[int, float], most: int) -> Workers | None:
    """Sequences to run at once, among the numbers that were measured.

    Offline is the fewest that together reach OFFLINE of the best rate: more only take memory.
    Interactive is the most at which each still has INTERACTIVE of the rate of one alone, and no
    more than offline.

    Args:
        rates: tokens/s of all sequences together, by their number.
        most: sequences that fit in memory.

    Returns:
        None where none fits, or one alone was not measured.
    """
    fitting = {count: rate for count, rate in sorted(rates.items()) if count <= most}
    if 1 not in fitting:
        return None
    best = max(fitting.values())
    offline = next(n for n, rate in fitting.items() if rate >= OFFLINE * best)
    least = INTERACTIVE * rates[1]
    interactive = [n for n, rate in fitting.items() if n <= offline and rate / n >= least]
    return Workers(max(interactive, default=1), offline)


@dataclass(frozen=True)
class Advice:
    """The recommendation of one level."""

    size: Size
    fits: int  # sequences of that size in memory
    workers: Workers | None  # None where none fits, or none was measured

    @property
    def workloads(self) -> list[Workload]:
        """Prefill, and decode behind the prompt: alone, interactive and offline."""
        size, together = self.size, {1}
        if self.workers:
            together |= {self.workers.interactive, self.workers.offline}
        decodes = [Decode(size.predict, size.prompt, count) for count in sorted(together)]
        return [Prefill(size.prompt), *decodes]


def trials(size: Size, counts: Sequence[int], context: int) -> list[Workload]:
    """Short decodes by one and by several numbers of sequences, within a model's context."""
    predict = max(1, min(TRIED_TOKENS, context // 2))
    depth = max(0, min(size.prompt, context - predict - 1))
    return [Decode(predict, depth, count) for count in sorted({1, *counts})]


def advise(
    found: Sequence[Size], rates: Mapping[int, float], fits: Callable[[int], int]
) -> list[Advice]:
    """The recommendation for each size.

    Args:
        rates: tokens/s of all sequences together, by their number.
        fits: number of sequences of so many tokens that fit in memory.
    """
    return [Advice(size, count := fits(size.length), workers(rates, count)) for size in found]


def profile_facts(
    path: Path,
    exchanges: int,
    lengths: Lengths,
    advices: Sequence[Advice],
    tried: Sequence[Workload],
    context: int,
) -> dict[str, Any]:
    """Lengths of a data set and recommendations for it, as JSON types.

    Args:
        exchanges: of the data set; those of a sample have ``lengths``.
        advices: by level.
        tried: workloads that were measured for them; none where that ended early.
        context: of the model, in tokens.
    """
    return {
        "file": path.name,
        "exchanges": exchanges,
        "counted": len(lengths.prompts),
        "prompts": summary(lengths.prompts),
        "outputs": summary(lengths.known_outputs),
        "levels": {advice.size.level: asdict(advice) for advice in advices},
        "rules": {"interactive": INTERACTIVE, "offline": OFFLINE},
        "tried": [workload.parallel for workload in tried],
        "context": context,
    }
