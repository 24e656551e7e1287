"""Data sets in all their forms, and errors with the number of the line."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxrun.analysis import dataset
from mlxrun.analysis.dataset import Exchange, exchanges, sample
from mlxrun.errors import DatasetError


@pytest.fixture
def read(tmp_path: Path):
    """Exchanges of a file with some lines, objects or text or bytes."""

    def call(*lines: object) -> list[Exchange]:
        path = tmp_path / "data.jsonl"
        raw = [x if isinstance(x, str | bytes) else json.dumps(x) for x in lines]
        path.write_bytes(b"\n".join(x.encode() if isinstance(x, str) else x for x in raw))
        return list(exchanges(path))

    return call


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


PAIRS = [
    {"prompt": "q", "response": "a"},
    {"prompt": "q", "completion": "a", "id": 7},
    {"input": "q", "output": "a"},
    {"question": "q", "answer": "a"},
    {"instruction": "q", "input": "", "output": "a"},
    {"prompt": [{"type": "text", "text": "q"}], "response": [{"type": "text", "text": "a"}]},
    {"prompt": [user("q")], "completion": [assistant("a")]},
    {"messages": [user("q"), assistant("a")]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"conversations": [user("q"), {"role": "model", "content": [{"text": "a"}]}]},
]


@pytest.mark.parametrize("record", PAIRS, ids=lambda record: "-".join(record))
def test_one_exchange_in_many_shapes(read, record):
    assert read(record) == [Exchange(1, (user("q"),), "a")]


def test_an_instruction_stands_above_its_input(read):
    (found,) = read({"instruction": "Sort:", "input": "b a", "output": "a b"})
    assert found.messages == (user("Sort:\n\nb a"),)


def test_every_answer_of_a_conversation_follows_what_stands_before_it(read):
    system = {"role": "system", "content": "s"}
    turns = [system, user("1"), assistant("2"), user("3"), assistant("4"), user("5")]
    assert read({"messages": turns}) == [
        Exchange(1, (system, user("1")), "2"),
        Exchange(1, (system, user("1"), assistant("2"), user("3")), "4"),
        Exchange(1, tuple(turns), None),
    ]


def test_unasked_turns_are_no_answers(read):
    calls = {"role": "assistant", "content": None}
    greeting = [assistant("hello"), user("1"), assistant("2")]
    assert read({"messages": greeting}) == [Exchange(1, tuple(greeting[:2]), "2")]
    assert read({"messages": []}, {"messages": [assistant("hello")]}) == []
    assert read({"messages": [user("1"), calls, {"role": "tool", "content": "x"}]}) == []


def test_outputs_may_be_missing_and_lines_empty(read):
    found = read({"prompt": "a"}, "", "  ", {"prompt": "b", "response": None})
    assert found == [Exchange(1, (user("a"),), None), Exchange(4, (user("b"),), None)]


def test_a_byte_order_mark_and_windows_lines(read):
    (found,) = read(b'\xef\xbb\xbf{"prompt": "a"}\r\n')
    assert found.messages == (user("a"),)


WRONG = [
    ("{", "no JSON: "),
    ('{"prompt": "a"} x', "no JSON: Extra data at character 17"),
    ("[" * 100_000, "no JSON: nested too deeply"),
    ("9" * 5000, "no JSON: a number that is too long"),
    ("7", "a number, not an object"),
    ("null", "null, not an object"),
    ('"text"', "a text, not an object"),
    ({"text": "a", "id": 1}, "no prompt: expected messages, .*; found the fields id, text"),
    ({}, "found the fields none"),
    ({"prompt": 7}, "prompt: a number, not a text"),
    ({"prompt": "a", "response": {"b": 1}}, "response: an object, not a text"),
    ({"prompt": "a", "response": [{"text": 1}]}, "response: a list, not a text"),
    ({"instruction": "a", "input": True}, "input: a truth value, not a text"),
    ({"messages": "a"}, "messages: a text, not a list of messages"),
    ({"messages": ["a"]}, r"messages\[0\]: no message with role and content"),
    ({"messages": [user("a"), user(7)]}, r"messages\[1\]: a number, not a text"),
    ({"messages": [{"role": "wizard", "content": ""}]}, "the role 'wizard' is none of system"),
    ({"conversations": [{"from": 3, "value": "a"}]}, "the role 3 is none of"),
    (b'{"prompt": "\xff"}', "byte 13 of it is no UTF-8"),
]


@pytest.mark.parametrize(("line", "message"), WRONG)
def test_errors_name_the_line(read, line, message):
    with pytest.raises(DatasetError, match=rf"^data.jsonl, line 3: .*{message}") as caught:
        read({"prompt": "a"}, "", line, "never reached")
    assert caught.value.line == 3


def test_one_list_is_no_file_of_lines(read):
    with pytest.raises(DatasetError, match=r"line 1: a list.*jq"):
        read(json.dumps(PAIRS))


def test_a_file_without_lines(read, monkeypatch):
    monkeypatch.setattr(dataset, "LONGEST_LINE", 1 << 20)
    with pytest.raises(DatasetError, match="line 2: longer than 1 MiB"):
        read({"prompt": "a"}, b"\0" * ((1 << 20) + 1))


def test_there_must_be_a_prompt_and_an_output(tmp_path):
    path = tmp_path / "data.jsonl"
    for text, lacks in (
        ("", "prompt"),
        ('{"messages": []}', "prompt"),
        ('{"prompt": "a"}', "output"),
    ):
        path.write_text(text)
        with pytest.raises(DatasetError, match=rf"^data.jsonl: there is no {lacks} in it$"):
            dataset.read(path, 10)
    path.write_text('{"prompt": "a", "output": "b"}\n{"prompt": "c"}')
    found, count = dataset.read(path, 10)
    assert [one.output for one in found] == ["b", None]
    assert count == 2


def test_a_directory(tmp_path):
    with pytest.raises(DatasetError, match="Is a directory"):
        list(exchanges(tmp_path))


@given(st.binary(max_size=200))
def test_noise_is_refused_or_read_but_never_more(tmp_path_factory, noise):
    path = tmp_path_factory.getbasetemp() / "noise.jsonl"
    path.write_bytes(noise)
    try:
        assert all(one.messages for one in exchanges(path))
    except DatasetError as error:
        assert error.line is not None


def test_a_sample_is_in_order_and_even():
    made = [Exchange(line, (), None) for line in range(12)]
    assert sample(made, 12) == (made, 12)
    assert sample([], 3) == ([], 0)
    seen: Counter[int] = Counter()
    for seed in range(2000):
        kept, count = sample(iter(made), 3, seed)
        lines = [one.line for one in kept]
        assert (count, len(set(lines)), lines) == (12, 3, sorted(lines))
        seen.update(lines)
    # 500 expected of each; nine standard deviations either side.
    assert all(abs(seen[line] - 500) < 9 * (500 * 0.75) ** 0.5 for line in range(12))
