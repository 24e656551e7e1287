"""Prompts and outputs out of a file of JSON lines, in the shapes that data sets come in.

A line is an object, and holds one of these, the first that is there:

* ``messages`` or ``conversations``: turns in order, each ``{"role", "content"}`` or, as ShareGPT
  has them, ``{"from", "value"}``. Every answer of the assistant is an output, and what stands
  before it is its prompt; a last turn of the user is a prompt without an output.
* ``prompt``, ``instruction`` (with ``input`` below it, as Alpaca has it), ``input`` or
  ``question``: a text, or messages; and ``response``, ``completion``, ``output`` or ``answer``,
  which may be missing.

A text is a string or a list of parts ``{"text": ...}``. Knows no model and counts no tokens.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxrun.errors import DatasetError

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


@dataclass(frozen=True)
class Exchange:
    """What a model was given, and what it answered.

    Attributes:
        line: of the file, from 1.
        messages: the prompt, as a conversation.
        output: the answer; None where the file has none.
    """

    line: int
    messages: tuple[Message, ...]
    output: str | None


class Shape(ValueError):  # noqa: N818 - becomes a DatasetError where the line is known
    """A line has something else than it should; says what."""


def read(path: Path, most: int) -> tuple[list[Exchange], int]:
    """An even sample of at most so many of a file's exchanges, and how many there are.

    Raises:
        DatasetError: as :func:`exchanges` raises it, or there is no prompt or no output.
    """
    found, count = sample(exchanges(path), most)
    lacks = "output" if found else "prompt"
    if all(exchange.output is None for exchange in found):
        raise DatasetError(path, None, f"there is no {lacks} in it")
    return found, count


def exchanges(path: Path) -> Iterator[Exchange]:
    """Exchanges of a file, in order; a conversation in which nobody is asked has none.

    Raises:
        DatasetError: it cannot be read, or a line is none of the shapes above.
    """
    for number, record in _records(path):
        try:
            yield from _exchanges(number, record)
        except Shape as shape:
            raise DatasetError(path, number, str(shape)) from None


def sample(found: Iterable[Exchange], most: int, seed: int = 0) -> tuple[list[Exchange], int]:
    """At most so many exchanges, each as likely as any other, in order; and how many there are.

    Vitter's Algorithm R ("Random sampling with a reservoir", 1985): one pass, bounded memory.
    """
    rng, count = random.Random(seed), 0
    kept: list[tuple[int, Exchange]] = []
    for count, exchange in enumerate(found, 1):
        if len(kept) < most:
            kept.append((count, exchange))
        elif (place := rng.randrange(count)) < most:
            kept[place] = (count, exchange)
    return [exchange for _, exchange in sorted(kept, key=lambda pair: pair[0])], count


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Objects of a file with the numbers of their lines; empty lines are skipped."""
    for number, line in _lines(path):
        if number == 1 and line.startswith("["):
            hint = "Write one object a line, as jq -c '.[]' does"
            raise DatasetError(path, number, "a list, not an object on each line", hint=hint)
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DatasetError(path, number, f"no JSON: {_reason(error)}") from None
        if not isinstance(record, dict):
            raise DatasetError(path, number, f"{_kind(record)}, not an object")
        yield number, record


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(raw) > LONGEST_LINE:
                    raise DatasetError(path, number, f"longer than {LONGEST_LINE >> 20} MiB")
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if line:
                    yield number, line
    except UnicodeDecodeError as error:
        found = f"byte {error.start + 1} of it is no UTF-8"
        raise DatasetError(path, number, found) from None
    except OSError as error:
        raise DatasetError(path, None, error.strerror or str(error)) from None


def _exchanges(line: int, record: Mapping[str, Any]) -> Iterator[Exchange]:
    for turns in _TURNS:
        if turns in record:
            return _of_turns(line, _messages(record[turns], turns))
    name = next((name for name in _PROMPTS if name in record), None)
    if name is None:
        names = ", ".join(sorted(map(str, record))[:8]) or "none"
        raise Shape(f"no prompt: expected {', '.join(_TURNS + _PROMPTS)}; found the fields {names}")
    return iter([Exchange(line, _prompt(record, name), _output(record))])


def _of_turns(line: int, messages: tuple[Message, ...]) -> Iterator[Exchange]:
    for place, message in enumerate(messages):
        before = messages[:place]
        asked = any(one["role"] == "user" for one in before)
        if message["role"] == "assistant" and asked and message["content"]:
            yield Exchange(line, before, message["content"])
    if messages and messages[-1]["role"] == "user":
        yield Exchange(line, messages, None)


def _prompt(record: Mapping[str, Any], name: str) -> tuple[Message, ...]:
    value = record[name]
    if isinstance(value, list) and value and all(_is_turn(turn) for turn in value):
        return _messages(value, name)
    text = _text(value, name)
    if name == "instruction" and record.get("input"):
        text = f"{text}\n\n{_text(record['input'], 'input')}"
    return ({"role": "user", "content": text},)


def _output(record: Mapping[str, Any]) -> str | None:
    for name in _OUTPUTS:
        value = record.get(name)
        if isinstance(value, list) and value and all(_is_turn(turn) for turn in value):
            return "".join(message["content"] for message in _messages(value, name))
        if value is not None:
            return _text(value, name)
    return None


def _messages(turns: Any, name: str) -> tuple[Message, ...]:
    if not isinstance(turns, list):
        raise Shape(f"{name}: {_kind(turns)}, not a list of messages")
    return tuple(_message(turn, f"{name}[{place}]") for place, turn in enumerate(turns))


def _message(turn: Any, where: str) -> Message:
    if not _is_turn(turn):
        raise Shape(f"{where}: no message with role and content, or from and value")
    role = turn["role"] if "role" in turn else turn["from"]
    known = _ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        raise Shape(f"{where}: the role {role!r} is none of {', '.join(_ROLES)}")
    content = turn["content"] if "content" in turn else turn.get("value")
    return {"role": known, "content": "" if content is None else _text(content, where)}


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and ("role" in value or "from" in value)


def _text(value: Any, where: str) -> str:
    """A text, or the texts of a list of parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        texts = [part.get("text", "") for part in value]
        if all(isinstance(text, str) for text in texts):
            return "".join(texts)
    raise Shape(f"{where}: {_kind(value)}, not a text")


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "a truth value"}
    return "null" if value is None else kinds.get(type(value), "a number")


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos + 1}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number that is too long"
