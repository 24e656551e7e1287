"""SIGKILL at random moments while files are written: what is left is absent, old or new.

    python -m tests.kill_stress --kills 1000

Every kill strikes a process of its own, forked from this one, in which everything is imported and
MLX has not been used. After each, the target and all that lies beside it are compared with what
they were and with what the work makes of them. Prints a line for each kind of work and one for all;
exits with 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlxrun
from converters import staging
from converters.huggingface.reader import read_header
from mlxrun import (
    convert,
    loader,  # noqa: F401
)
from mlxrun.cli import chat, conversation  # noqa: F401 - once, for all forks
from mlxrun.cli.main import run
from mlxrun.kv_cache import storage
from tests.tiny_models import Tiny

HIDDEN = ".mlxrun-partial-"
GREEDY = ("--max-tokens", "3", "--temperature", "0")
# This share of the kills strikes while something is being written, the others at any moment.
WRITING = 0.7

# What each of the files that a work writes holds: None if it is not there.
Look = tuple[str | None, ...]


@dataclass
class Kind:
    """A kind of work to be killed.

    Attributes:
        name: to print.
        begin: what a file or directory of that name is before, or None.
        work: runs in a forked process.
        look: at what the work writes; raises where it is half written.
        seconds: that the work takes, in all and from when something is first written.
        old, new: what ``look`` finds before and after it.
        states: how often each was left.
    """

    name: str
    begin: dict[str, Path | None]
    work: Callable[[], object]
    look: Callable[[], Look]
    seconds: tuple[float, float] = (0.0, 0.0)
    old: Look = ()
    new: Look = ()
    states: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        counts = ", ".join(f"{self.states[state]} {state}" for state in sorted(self.states))
        whole, writing = self.seconds
        took = f"of {whole:.2f} s, {writing:.2f} s of them writing"
        return f"{self.name:28} {self.states.total():4} kills {took}: {counts}"


class Stress:
    """A folder with models and bystanders, and the kinds of work.

    Args:
        folder: an empty one.
        seed: of the moments.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.folder, self.place = folder, folder / "place"
        self.place.mkdir()
        self.target, self.talk = self.place / "target", self.place / "talk"
        self.problems: list[str] = []
        self.leftovers = 0
        self._bystanders()
        self.before = self._beside()
        self.kinds = self._kinds()

    def _bystanders(self) -> None:
        """What belongs to others, with names that might be mistaken."""
        for name in ("target.json", "target.gguf", ".target", "notes.txt", "target.cache"):
            (self.place / name).write_text(f"{name} is somebody's")
        for name in ("target-old", ".mlxrun", ".mlxrun-partialx"):
            (self.place / name).mkdir()
            (self.place / name / "config.json").write_text("somebody's")
        (self.place / f"{HIDDEN}link").symlink_to("target-old")
        os.mkfifo(self.place / "talk.json")

    def _kinds(self) -> list[Kind]:
        def model(seed: int) -> Path:
            keys = {"context_length": 256}
            return Tiny(seed=seed, layers=3, keys=keys).write(self.folder / f"{seed}.gguf")

        first, second = model(0), model(1)
        talk, memory = self.talk, conversation.cache_path(self.talk)

        def overwrite() -> None:
            convert(second, self.target, overwrite=True)

        def without_exchange() -> None:
            staging._exchange = lambda *_: False
            overwrite()

        def chatted(*options: str) -> None:
            sys.stdin = io.TextIOWrapper(io.BytesIO(b"one\ntwo\n"))
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
            code = run(["chat", str(first), *options, "--save", str(talk), *GREEDY])
            assert code == 0, code

        def session(length: int) -> None:
            llm = mlxrun.load(first)
            made = llm.session()
            llm.generate([*range(3, 3 + length)], session=made, max_tokens=1, ignore_eos=True)
            made.save(self.target)

        self._run(lambda: convert(first, self.target))
        self._run(chatted)
        old = {
            path.name: path.rename(self.folder / path.name) for path in (self.target, talk, memory)
        }
        self._run(lambda: session(20))
        old_session = self.target.rename(self.folder / "session")
        aside = staging.set_aside(self.target).name

        empty: dict[str, Path | None] = {"target": None, aside: None}
        model_there = empty | {"target": old["target"]}
        session_there = empty | {"target": old_session}
        no_talk: dict[str, Path | None] = {talk.name: None, memory.name: None}
        return [
            Kind("convert", empty, lambda: convert(first, self.target), self._model),
            Kind("convert --overwrite", model_there, overwrite, self._model),
            Kind("the same without exchange", model_there, without_exchange, self._model),
            Kind("chat --save", no_talk, chatted, self._talk),
            Kind(
                "chat --load --save",
                {name: old[name] for name in no_talk},
                lambda: chatted("--load", str(talk)),
                self._talk,
            ),
            Kind("session.save", empty, lambda: session(20), self._session),
            Kind("session.save over another", session_there, lambda: session(200), self._session),
        ]

    # What is left.

    def _model(self) -> Look:
        """A model; where names cannot be exchanged, it may be the one that was set aside."""
        aside = staging.set_aside(self.target)
        return (digest(self.target if self.target.exists() else aside),)

    def _talk(self) -> Look:
        if not self.talk.exists():
            return None, tokens(conversation.cache_path(self.talk))
        stored = conversation._read(self.talk, str(self.talk))
        return str(len(stored["messages"])), tokens(conversation.cache_path(self.talk))

    def _session(self) -> Look:
        return (tokens(self.target),)

    def _beside(self) -> dict[str, str | None]:
        """What lies beside the targets."""
        ours = {"target", "talk", "talk.cache", staging.set_aside(self.target).name}
        return {
            entry.name: "a pipe" if entry.is_fifo() else digest(entry)
            for entry in sorted(self.place.iterdir())
            if entry.name not in ours and not is_hidden(entry)
        }

    # Killing.

    def _fork(self, work: Callable[[], object]) -> tuple[int, int]:
        """A process that does work, and a pipe that has a byte once something is being written."""
        reader, writer = os.pipe()
        pid = os.fork()
        if pid:
            os.close(writer)
            return pid, reader
        create = staging._create

        def created(*arguments: Any) -> tuple[Path, int]:
            made = create(*arguments)
            os.write(writer, b".")
            return made

        staging._create = created
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)

    def _run(self, work: Callable[[], object]) -> tuple[float, float]:
        """Let work be done; returns the seconds that it takes, and those since it writes."""
        started = time.perf_counter()
        pid, reader = self._fork(work)
        os.read(reader, 1)
        writing = time.perf_counter()
        _, status = os.waitpid(pid, 0)
        os.close(reader)
        assert status == 0, f"the work itself failed: {status}"
        ended = time.perf_counter()
        return ended - started, ended - writing

    def _prepare(self, kind: Kind) -> None:
        for name, source in kind.begin.items():
            place = self.place / name
            staging._remove(place)
            if source:
                (shutil.copytree if source.is_dir() else shutil.copyfile)(source, place)

    def measure(self) -> None:
        """Do each work twice: how long it takes, and what it makes."""
        for kind in self.kinds:
            for _ in range(2):
                self._prepare(kind)
                kind.old = kind.look()
                kind.seconds = self._run(kind.work)
                kind.new = kind.look()
            assert kind.old != kind.new, kind.name

    def kill(self, kind: Kind) -> None:
        """Kill the work once; how it was left is not counted where it was done before."""
        self._prepare(kind)
        writing = self.random.random() < WRITING
        pid, reader = self._fork(kind.work)
        if writing:
            os.read(reader, 1)
        time.sleep(kind.seconds[writing] * self.random.uniform(0, 1.1))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        os.close(reader)
        try:
            state = self._state(kind)
            assert status in (0, signal.SIGKILL), f"the work failed: {status}"
            assert self._beside() == self.before, "somebody else's files have changed"
        except Exception as error:
            state = "WRONG"
            self.problems.append(f"{kind.name}: {type(error).__name__}: {error}")
        self.leftovers += any(map(is_hidden, self.place.iterdir()))
        if status == signal.SIGKILL:
            kind.states[state] += 1

    def _state(self, kind: Kind) -> str:
        found = kind.look()
        for part, old, new in zip(found, kind.old, kind.new, strict=True):
            assert part in (old, new), f"it is neither old nor new: {part}"
        if found[0] == kind.new[0]:
            return "new"
        return "old" if found[0] else "absent"

    def finish(self) -> None:
        """The next work removes what killed ones left."""
        self._prepare(self.kinds[1])
        self._run(self.kinds[1].work)
        hidden = [entry.name for entry in self.place.iterdir() if is_hidden(entry)]
        if hidden or staging.set_aside(self.target).exists():
            self.problems.append(f"left for good: {hidden}")


def digest(path: Path) -> str | None:
    """Of a file, or of all files of a directory and of their names; None where there is nothing."""
    if not path.exists():
        return None
    made = hashlib.sha256()
    for file in sorted([path, *path.rglob("*")]):
        made.update(f"{file.relative_to(path)} {file.is_dir()}\n".encode())
        if file.is_file():
            made.update(file.read_bytes())
    return made.hexdigest()


def tokens(path: Path) -> str | None:
    """How many tokens a saved session holds, once its sum is found right; None without a file."""
    if not path.exists():
        return None
    storage._checked(path)
    return str(read_header(path)["tokens"].shape)


def is_hidden(path: Path) -> bool:
    """Whether it was left by a killed process."""
    return path.name.startswith(HIDDEN) and not path.is_symlink()


def main(arguments: list[str] | None = None) -> int:
    """Kill as often as asked, print what came of it, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        stress = Stress(Path(folder), args.seed)
        stress.measure()
        while (done := sum(kind.states.total() for kind in stress.kinds)) < args.kills:
            stress.kill(stress.kinds[done % len(stress.kinds)])
        stress.finish()
    states = sum((kind.states for kind in stress.kinds), Counter())
    for kind in stress.kinds:
        print(kind)
    for problem in stress.problems[:20]:
        print(problem)
    counts = ", ".join(f"{states[state]} {state}" for state in ("absent", "old", "new"))
    wrong, took = len(stress.problems), time.perf_counter() - started
    print(
        f"{states.total()} kills: {counts}, {wrong} wrong; hidden leftovers after "
        f"{stress.leftovers}, swept by the next work; {took:.0f} s"
    )
    return bool(stress.problems)


if __name__ == "__main__":
    sys.exit(main())
