"""Many prompts to their ends, together."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
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

from mlxrun.admission import Admission
from mlxrun.cache import sparsity
from mlxrun.cache.choice import Wanted
from mlxrun.computing import COMPUTING
from mlxrun.errors import MlxrunError, ParameterError
from mlxrun.generation.reply import Reply
from mlxrun.generation.request import Chunk, Completion, Request, completed
from mlxrun.generation.serving import Job, Service

if TYPE_CHECKING:
    from mlxrun.asking import Prompt
    from mlxrun.llm import LLM

OnToken = Callable[[int, Chunk], None]

PARALLEL = 32
# Seconds before a progress bar appears.
PATIENCE = 2.0
# What may be given once for all prompts, or as a list with a value for each.
_EACH = ("max_tokens", "temperature", "seed", "priority", "deadline", "params", "ignore_eos")


def batch(
    llm: LLM,
    prompts: Sequence[Prompt],
    *,
    parallel: int | None = None,
    deterministic: bool = False,
    prefix_bytes: int | None = None,
    cache_type_k: str | None = None,
    cache_type_v: str | None = None,
    attention: str | None = None,
    on_token: OnToken | None = None,
    progress: bool | None = None,
    **options: Any,
) -> list[Completion]:
    """Continue many prompts together.

    Args:
        llm: the model and its tokenizer.
        prompts: each as :meth:`LLM.stream` takes one.
        parallel: the most sequences that are live at once; by default up to 32.
        deterministic: compute each sequence alone, so that not even rounding depends on the others.
        prefix_bytes: what beginnings of prompts may take, so that those which share them need not
            compute them again; 0 for none. By default the model's ``prefix_cache`` is used.
        cache_type_k, cache_type_v, attention: how keys and values are stored, and which of them
            drawn tokens attend to; see :meth:`LLM.session`.
        on_token: called with the number of a prompt and each chunk of its reply.
        progress: show a bar on stderr; by default in a terminal or notebook, once the job has taken
            two seconds.
        options: those of :meth:`LLM.stream`. ``max_tokens``, ``temperature``, ``seed``,
            ``priority``, ``deadline``, ``params`` and ``ignore_eos`` may be lists with a value for
            each prompt.

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
    each = [_own(options, i, len(prompts)) for i in range(len(prompts))]
    requests = [llm.asker.request(p, **own) for p, own in zip(prompts, each, strict=True)]
    window, keep, sparse = sparsity.options(attention)
    limits = [llm.asker.limit(request, windowed=window is not None) for request in requests]
    make = partial(
        llm.model.make_cache,
        window=window, keep=keep, keys=cache_type_k, values=cache_type_v, sparse=sparse,
    )  # fmt: skip
    replies: list[list[Chunk]] = [[] for _ in prompts]
    bar = _Bar(progress, len(prompts), sum(limits))

    def listen(number: int) -> Callable[[Chunk | MlxrunError], None]:
        def take(item: Chunk | MlxrunError) -> None:
            if not isinstance(item, Chunk):
                raise item
            replies[number].append(item)
            bar.advance(len(item.tokens), ended=item.finish_reason is not None)
            if on_token:
                on_token(number, item)

        return take

    def job(number: int, request: Request) -> Job:
        reply = Reply(request, llm.tokenizer, limits[number], started)
        sampler = llm.asker.sampler(request)
        cache = make()
        return Job(request, sampler, reply, limits[number], cache, 0, listen(number))

    if not requests:
        return []
    rows = min(len(prompts), PARALLEL) if parallel is None else parallel
    with COMPUTING:
        mx.reset_peak_memory()
        prefixes = llm.sessions.prefixes(prefix_bytes)
        wanted = Wanted(window, keep, cache_type_k, cache_type_v, sparse)
        admission = Admission(llm, wanted, rows, prefixes.budget)
        costs = [
            admission.cost(len(request.prompt), limit)
            for request, limit in zip(requests, limits, strict=True)
        ]
        service = Service(
            llm.model,
            rows=rows,
            queue=len(prompts),
            memory=admission.memory,
            deterministic=deterministic,
            prefixes=prefixes,
        )
    with bar:
        try:
            for number, request in enumerate(requests):
                with COMPUTING:
                    service.submit(job(number, request), cost=costs[number])
            while service.busy:
                with COMPUTING:
                    service.step()
        finally:
            with COMPUTING:
                service.abandon()
    return [completed(chunks) for chunks in replies]


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
        self._replies, self._ended = replies, 0
        self._tokens, self._drawn = tokens, 0
        self._start = time.monotonic()
        self._bar: Progress | None = None

    def advance(self, tokens: int, *, ended: bool) -> None:
        self._drawn += tokens
        self._ended += ended
        if not self._shown or time.monotonic() - self._start < PATIENCE:
            return
        if self._bar is None:
            self._bar = _progress(self._tokens)
        text = f"{self._ended} of {self._replies} replies"
        self._bar.update(TaskID(0), completed=self._drawn, description=text)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _progress(tokens: int) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    rest = (TextColumn("tokens"), TimeRemainingColumn())
    bar = Progress(*columns, *rest, console=Console(stderr=True), transient=True)
    bar.add_task("", total=tokens)
    bar.start()
    return bar
