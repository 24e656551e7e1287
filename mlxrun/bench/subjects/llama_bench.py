"""llama.cpp through its ``llama-bench``, a process for each run, so that runs can take turns.

Knows how it is asked and how it answers; imports no MLX. Its own warm-up and the loading of the
model are no part of the times that it tells.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from mlxrun.bench.results import Run
from mlxrun.bench.workload import Decode, Prefill, Workload
from mlxrun.errors import ParameterError, RivalError

BINARY = "llama-bench"


def located_binary() -> str:
    """Where ``llama-bench`` is.

    Raises:
        RivalError: it is not on the path.
    """
    found = shutil.which(BINARY)
    if found is None:
        raise RivalError(
            f"{BINARY} is not on the path", hint="Install llama.cpp, or measure without it"
        )
    return found


class LlamaBench:
    """llama.cpp with a GGUF, in the form that the file has.

    Args:
        path: the file, or the first shard of a split one.

    Raises:
        ParameterError: it is a directory.
        RivalError: the binary is not on the path.
    """

    name = BINARY
    load_seconds: float | None = None

    def __init__(self, path: Path) -> None:
        self._binary = located_binary()
        if path.is_dir():
            raise ParameterError("model", path.name, "a GGUF file, for llama-bench")
        self._path = path
        self.about = "weights as in the file"

    def can(self, workload: Workload) -> bool:
        """It reads and draws one sequence at a time."""
        return isinstance(workload, Prefill | Decode) and workload.parallel == 1

    def run(self, workload: Workload) -> Run:
        """One run.

        Raises:
            RivalError: it fails, or answers what cannot be understood.
        """
        read = workload.prompt if isinstance(workload, Prefill) else 0
        drawn = workload.predict if isinstance(workload, Decode) else 0
        assert isinstance(workload, Prefill | Decode)
        arguments = {"-m": self._path, "-p": read, "-n": drawn, "-d": workload.context, "-r": 1}
        words = [str(word) for pair in arguments.items() for word in pair]
        command = [self._binary, *words, "-o", "json"]
        answer = parsed(_output(command))
        self.about = described(answer)
        return Run(answer["samples_ns"][0] / 1e9)


def _output(command: list[str]) -> str:
    """What it prints."""
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=False
        )
    except OSError as error:
        raise RivalError(f"{command[0]} cannot be started: {error.strerror}") from error
    if not done.returncode:
        return done.stdout
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1][:200]
    code = done.returncode
    how = f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
    raise RivalError(f"{BINARY} {how}: {last}")


def parsed(text: str) -> dict[str, Any]:
    """The only test in an answer of ``llama-bench -o json``.

    Raises:
        RivalError: there is none with its times.
    """
    try:
        (test,) = json.loads(text)
        if test["samples_ns"][0] > 0:
            return dict(test)
    except (ValueError, TypeError, KeyError, IndexError):
        pass
    raise RivalError(
        f"{BINARY} answered with no times", hint="Its version may be too old: it must know -o json"
    )


def described(answer: dict[str, Any]) -> str:
    """What ran the test, as far as the answer tells it."""
    wanted = ("build_commit", "backends", "model_type", "n_threads")
    known = (f"{name} {answer[name]}" for name in wanted if answer.get(name) not in (None, ""))
    return "weights as in the file, " + ", ".join(known)
