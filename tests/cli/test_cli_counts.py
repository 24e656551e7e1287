"""Lists of numbers on the command line."""

from __future__ import annotations

import click
import pytest

from mlxrun.cli.options import CountList


@pytest.mark.parametrize(
    ("text", "found"),
    [("128,512", (128, 512)), ("1k, 4K", (1024, 4096)), ("0", (0,)), ("2,2,1", (2, 1))],
)
def test_lists_of_numbers(text, found):
    assert CountList().convert(text, None, None) == found


@pytest.mark.parametrize("text", ["", "a", "1,,2", "-1", "1.5", "1g", "17m", "9" * 40, "１"])
def test_what_is_no_list_of_numbers(text):
    with pytest.raises(click.BadParameter, match="is not numbers from 1"):
        CountList(1).convert(text, None, None)
