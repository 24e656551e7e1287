"""Many prompts to their ends, together."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from mlxrun.admission import Front, Options
from mlxrun.computing import COMPUTING
from mlxrun.errors import MlxrunError, ParameterError
from mlxrun.generation.request import Chunk, Completion, completed

if TYPE_CHECKING:
    from mlxrun.asking import Prompt
    from mlxrun.llm import LLM

OnToken = Callable[[int, Chunk], None]

PARALLEL = 32
# Seconds before a progress bar appears.
PATIENCE = 2.0
_SHARED = tuple(field.name for field in fields(Options))
# What may be given once for all prompts, or as a list with a value for each.
_EACH = ("max_tokens", "temperature", "seed", "priority", "deadline", "params", "ignore_eos")


def batch(
    llm: LLM,
    prompts: Sequence[Prompt],
    *,
    parallel: int | None = None,
    on_token: OnToken | None = None,
    progress: bool | None = None,
    **options: Any,
) -> list[Completion]:
    """Continue many prompts together.

    Args:
        llm: the model and its tokenizer.
        prompts: each as :meth:`LLM.stream` takes one.
        parallel: the most sequences that are live at once; by default up to 32.
        on_token: called with the number of a prompt and each chunk of its reply.
        progress: show a bar on stderr; by default in a terminal or notebook, once the job has taken
            two seconds.
        options: those of :class:`mlxrun.admission.Options`, which hold for all, and those of
            :meth:`LLM.stream`, of which ``max_tokens``, ``temperature``, ``seed``, ``priority``,
            ``deadline``, ``params`` and ``ignore_eos`` may be lists with a value for each prompt.

    Returns:
        One completion for each prompt, in order.

    Raises:
        ParameterError, ContextLengthError: as :meth:`LLM.stream` raises them, before anything is
            computed.
        MemoryLimitError: there is never room for one of them.
        NumericError: the model computes no numbers for a prompt.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise ParameterError("prompts", prompts, "a sequence of prompts")
    started = time.perf_counter()
    shared = Options(**{name: options.pop(name) for name in _SHARED if name in options})
    each = [_own(options, i, len(prompts)) for i in range(len(prompts))]
    requests = [llm.asker.request(p, **own) for p, own in zip(prompts, each, strict=True)]
    if not requests:
        return []
    with COMPUTING:
        mx.reset_peak_memory()
        rows = min(len(prompts), PARALLEL) if parallel is None else parallel
        front = Front(llm, shared, parallel=rows, queue=len(prompts), offline=True)
    limits = [front.limit(request) for request in requests]
    news: list[tuple[int, Chunk]] = []
    replies = [_Heard(number, news) for number in range(len(prompts))]
    bar = _Bar(progress, len(prompts), sum(limits))
    try:
        for request, limit, reply in zip(requests, limits, replies, strict=True):
            with COMPUTING:
                front.submit(request, limit, started, reply)
        while front.service.busy:
            with COMPUTING:
                front.service.step()
            # Told without holding the lock: who listens may wait for what another thread computes.
            if on_token:
                for number, chunk in news:
                    on_token(number, chunk)
            news.clear()
            bar.show(sum(r.tokens for r in replies), sum(r.ended for r in replies))
    finally:
        bar.close()
        with COMPUTING:
            front.service.abandon()
    return [completed(reply.chunks) for reply in replies]


class _Heard:
    """What one prompt's reply is so far."""

    def __init__(self, number: int, news: list[tuple[int, Chunk]]) -> None:
        self._number, self._news = number, news
        self.chunks: list[Chunk] = []
        self.tokens, self.ended = 0, False

    def __call__(self, item: Chunk | MlxrunError) -> None:
        if not isinstance(item, Chunk):
            raise item
        self.chunks.append(item)
        self.tokens += len(item.tokens)
        self.ended = item.finish_reason is not None
        self._news.append((self._number, item))


def _own(options: dict[str, Any], number: int, count: int) -> dict[str, Any]:
    """The options of one prompt."""
    own = dict(options)
    for name in _EACH:
        values = own.get(name)
        if isinstance(values, list | tuple):
            if len(values) != count:
                raise ParameterError(name, values, f"one value, or a list of {count}")
            own[name] = values[number]
    return own


class _Bar:
    """Tokens and replies so far, where somebody watches and the job is long."""

    def __init__(self, show: bool | None, replies: int, tokens: int) -> None:
        watched = "ipykernel" in sys.modules or sys.stderr.isatty()
        self._shown = watched if show is None else show
        self._replies, self._tokens = replies, tokens
        self._start = time.monotonic()
        self._bar: Progress | None = None

    def show(self, drawn: int, ended: int) -> None:
        """Tokens drawn and replies ended so far."""
        if not self._shown or time.monotonic() - self._start < PATIENCE:
            return
        if self._bar is None:
            self._bar = _progress(self._tokens)
        text = f"{ended} of {self._replies} replies"
        self._bar.update(TaskID(0), completed=drawn, description=text)

    def close(self) -> None:
        """Take it away."""
        if self._bar is not None:
            self._bar.stop()


def _progress(tokens: int) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    rest = (TextColumn("tokens"), TimeRemainingColumn())
    bar = Progress(*columns, *rest, console=Console(stderr=True), transient=True)
    bar.add_task("", total=tokens)
    bar.start()
    return bar
