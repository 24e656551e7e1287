"""Files are replaced whole or not at all."""

from __future__ import annotations

import stat

import pytest

from mlxrun.files import replacing


def test_the_new_file_takes_the_name(tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("old")
    with replacing(path, ".txt") as partial:
        assert partial.suffix == ".txt"
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("reason", [ValueError, KeyboardInterrupt])
def test_what_ends_early_changes_nothing(tmp_path, reason):
    path = tmp_path / "kept.txt"
    path.write_text("old")

    def fill():
        with replacing(path) as partial:
            partial.write_text("new")
            raise reason

    with pytest.raises(reason):
        fill()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_who_may_read_it(tmp_path, mode):
    with replacing(tmp_path / "file", mode=mode):
        pass
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode
