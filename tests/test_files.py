"""Files are replaced whole or not at all."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from mlxrun import files
from mlxrun.files import check_writable, remove, replacing


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


@pytest.mark.parametrize("what", ["pipe", "link to a pipe", "directory"])
def test_only_regular_files_are_replaced(tmp_path, what):
    path = tmp_path / "x"
    if what == "directory":
        path.mkdir()
    else:
        os.mkfifo(tmp_path / "pipe")
        path = tmp_path / "pipe"
        if what != "pipe":
            path = tmp_path / "link"
            path.symlink_to("pipe")
    before = path.stat(), set(tmp_path.iterdir())
    with pytest.raises(OSError, match="it is a d"), replacing(path):
        pass
    with pytest.raises(OSError, match="it is a d"):
        check_writable(path)
    assert (path.stat(), set(tmp_path.iterdir())) == before


def test_what_becomes_something_else_meanwhile_is_left_alone(tmp_path):
    path = tmp_path / "x"
    with pytest.raises(OSError, match="it is a device, a pipe"), replacing(path) as partial:
        partial.write_text("new")
        os.mkfifo(path)
    assert stat.S_ISFIFO(path.stat().st_mode) and list(tmp_path.iterdir()) == [path]


def test_the_new_name_outlasts_a_power_failure(tmp_path, monkeypatch):
    path, real, flushed = tmp_path / "file", os.fsync, []

    def fsync(descriptor):
        flushed.append((os.fstat(descriptor).st_ino, path.exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with replacing(path) as partial:
        partial.write_text("new")
    assert flushed == [(path.stat().st_ino, False), (tmp_path.stat().st_ino, True)]


def test_another_users_link_is_not_followed(tmp_path, monkeypatch):
    def follow(path):
        raise PermissionError(errno.EACCES, "it is a link of another user", str(path))

    link = tmp_path / "link"
    link.symlink_to("real")
    monkeypatch.setattr(files, "follow", follow)
    for attempt in (replacing(link).__enter__, lambda: check_writable(link), lambda: remove(link)):
        with pytest.raises(PermissionError, match="another user"):
            attempt()
    assert list(tmp_path.iterdir()) == [link]


def test_a_link_stays_when_its_file_is_removed(tmp_path):
    (tmp_path / "real").write_text("x")
    (tmp_path / "link").symlink_to("real")
    for _ in range(2):
        remove(tmp_path / "link")
        assert list(tmp_path.iterdir()) == [tmp_path / "link"]
