"""What is made under a hidden name: how it gets its own, and what is left when it is killed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from converters import staging
from converters.staging import follow, publish, set_aside, staged

ROOT = Path(__file__).resolve().parents[2]


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def model(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "config.json").write_text(content)
    return path


def content(path: Path) -> str:
    return (path / "config.json").read_text()


MAKING = """
import sys, time
from pathlib import Path
from converters.staging import staged
with staged(Path(sys.argv[1]), directory=sys.argv[2] == "directory") as path:
    inside = path / "shard-0" if path.is_dir() else path
    inside.write_text("half")
    print(path.name, flush=True)
    time.sleep(600)
"""


def maker(place: Path, kind: str) -> tuple[subprocess.Popen[str], str]:
    """A process in the midst of making something, and the hidden name of that."""
    process = subprocess.Popen(
        [sys.executable, "-c", MAKING, str(place), kind],
        stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_what_the_living_make_stays_and_what_the_killed_left_goes(
    tmp_path: Path, kind: str
) -> None:
    process, hidden = maker(tmp_path / "one", kind)
    try:
        with staged(tmp_path / "two", directory=True) as path:
            assert names(tmp_path) == {hidden, path.name}
    finally:
        kill(process)
    assert names(tmp_path) == {hidden}
    with staged(tmp_path / "two") as path:
        assert names(tmp_path) == {path.name}
    assert names(tmp_path) == set()


def test_what_has_another_kind_or_name_is_not_swept(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / ".mlxrun-partial-link").symlink_to("mine")
    (tmp_path / ".mlxrun-partialx").mkdir()
    os.mkfifo(tmp_path / ".mlxrun-partial-pipe")
    before = names(tmp_path)
    with staged(tmp_path / "two"):
        pass
    assert names(tmp_path) == before


def test_a_name_that_was_swept_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, swept = staging._lock, []

    def lock(path: Path, *, needed: bool) -> int | None:
        if not swept:
            swept.append(path)
            path.rmdir()
        return real(path, needed=needed)

    monkeypatch.setattr(staging, "_lock", lock)
    with staged(tmp_path / "one", directory=True) as path:
        assert path.is_dir() and path != swept[0]


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EBADF, "no locks")

    monkeypatch.setattr(staging.fcntl, "flock", refuse)
    with staged(tmp_path / "one", directory=True) as one, staged(tmp_path / "two") as two:
        assert names(tmp_path) == {one.name, two.name}
    assert names(tmp_path) == set()


def test_directories_are_exchanged_in_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = model(tmp_path / "m", "old")

    def never(*_: object) -> None:
        raise AssertionError("renamed")

    with staged(old, directory=True) as made:
        (made / "config.json").write_text("new")
        monkeypatch.setattr(Path, "rename", never)
        publish(made, old)
        assert (content(old), content(made)) == ("new", "old")
    assert names(tmp_path) == {"m"}


@pytest.fixture
def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that cannot exchange names."""
    monkeypatch.setattr(staging, "_exchange", lambda *_: False)


@pytest.mark.usefixtures("no_exchange")
def test_elsewhere_the_old_one_makes_room(tmp_path: Path) -> None:
    old = model(tmp_path / "m", "old")
    with staged(old, directory=True) as made:
        (made / "config.json").write_text("new")
        publish(made, old)
    assert content(old) == "new" and names(tmp_path) == {"m"}


@pytest.mark.usefixtures("no_exchange")
@pytest.mark.parametrize("failure", [OSError(errno.EIO, "broken"), KeyboardInterrupt()])
def test_what_could_not_be_replaced_keeps_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    old, rename = model(tmp_path / "m", "old"), Path.rename

    def fails(self: Path, to: Path) -> Path:
        if to == old and self != set_aside(old):
            raise failure
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(type(failure)), staged(old, directory=True) as made:
        publish(made, old)
    assert content(old) == "old" and names(tmp_path) == {"m"}


@pytest.mark.parametrize("replaced", [False, True])
def test_what_was_set_aside_when_a_process_was_killed(tmp_path: Path, replaced: bool) -> None:
    place = tmp_path / "m"
    model(set_aside(place), "old")
    if replaced:
        model(place, "new")
    with staged(place, directory=True) as made:
        assert names(tmp_path) == {"m", made.name}
    assert content(place) == ("new" if replaced else "old")


@pytest.mark.parametrize("what", ["a file is made", "a link", "another user's"])
def test_what_only_has_the_name_of_what_is_set_aside_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    place = model(tmp_path / "m", "new")
    old = model(tmp_path / "elsewhere" if what == "a link" else set_aside(place), "old")
    if what == "a link":
        set_aside(place).symlink_to("elsewhere")
    if what == "another user's":
        monkeypatch.setattr(os, "geteuid", lambda: old.stat().st_uid + 1)
    with staged(place, directory=what != "a file is made"):
        pass
    assert content(set_aside(place)) == "old" and content(place) == "new"


@pytest.mark.parametrize("directory", [False, True])
def test_the_longest_name(tmp_path: Path, directory: bool) -> None:
    place = tmp_path / ("x" * os.pathconf(tmp_path, "PC_NAME_MAX"))
    with staged(place, directory=directory) as made:
        made.rename(place)
    assert names(tmp_path) == {place.name}


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("folder/../three")
    assert follow(tmp_path / "one") == follow(tmp_path / "three") == tmp_path / "three"
    (tmp_path / "three").symlink_to("one")
    with pytest.raises(OSError, match="Too many levels"):
        follow(tmp_path / "one")


@pytest.mark.parametrize("mode", [0o1777, 0o755])
def test_another_users_link_in_a_shared_folder_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    tmp_path.chmod(mode)
    (tmp_path / "link").symlink_to("real")
    assert follow(tmp_path / "link") == tmp_path / "real"
    real = Path.lstat

    def lstat(self: Path) -> os.stat_result:
        fields = list(real(self))
        fields[4] += 1  # the owner
        return os.stat_result(fields)

    monkeypatch.setattr(Path, "lstat", lstat)
    if mode == 0o755:
        assert follow(tmp_path / "link") == tmp_path / "real"
        return
    with pytest.raises(PermissionError, match="a link of another user"):
        follow(tmp_path / "link")
