"""Many prompts to their ends, together."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

import mlx.core as mx

from mlxrun.admission import Accepted, Front
from mlxrun.computing import COMPUTING
from mlxrun.config import EngineConfig, StorageOptions, check_callback, known, names_of
from mlxrun.display import in_notebook, progress_bar
from mlxrun.errors import MlxrunError, ParameterError
from mlxrun.generation.scheduler import LEAD
from mlxrun.outputs import BatchOptions, Chunk, Completion, completed

if TYPE_CHECKING:
    from mlxrun.asking import Prompt
    from mlxrun.llm import LLM

OnToken = Callable[[int, Chunk], None]

PARALLEL = 32
# Seconds before a progress bar appears.
PATIENCE = 2.0
# What holds for all requests of a batch.
_SHARED = ("parallel", "context", "deterministic", "stall", "prefix_bytes")
# What may be given once for all prompts, or as a list with a value for each.
_EACH = (
    *("max_tokens", "temperature", "seed", "priority", "deadline", "params", "ignore_eos"),
    *names_of(StorageOptions),
)


def batch(
    llm: LLM,
    prompts: Sequence[Prompt],
    *,
    on_token: OnToken | None = None,
    progress: bool | None = None,
    **options: Unpack[BatchOptions],
) -> list[Completion]:
    """Continue many prompts together.

    Args:
        llm: the model and its tokenizer.
        prompts: each as :meth:`LLM.stream` takes one.
        on_token: called with the index of a prompt and each chunk of its completion.
        progress: show a bar on stderr; by default in a terminal or notebook, once the job has taken
            two seconds.
        options: ``parallel``, ``context``, ``deterministic``, ``stall`` and ``prefix_bytes`` of
            :class:`mlxrun.config.EngineConfig`, and those of :meth:`LLM.stream`, some of which may
            be lists with a value per prompt: see :class:`mlxrun.outputs.BatchOptions`.

    Returns:
        One completion for each prompt, in order.

    Raises:
        ParameterError, ContextLengthError: as :meth:`LLM.stream` raises them, before anything is
            computed.
        MemoryLimitError: there is never room for one of them, or none for what is asked for.
        NumericError: the model computes no numbers for a prompt.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise ParameterError("prompts", prompts, "a sequence of prompts")
    check_callback("on_token", on_token, "the number of a prompt and a chunk")
    if progress is not None and not isinstance(progress, bool):
        raise ParameterError("progress", progress, "True, False or None")
    known(options, names_of(BatchOptions))
    given: dict[str, Any] = {**options}
    started = time.perf_counter()
    config = EngineConfig(**{name: given.pop(name) for name in _SHARED if name in given})
    each = [_own(given, i, len(prompts)) for i in range(len(prompts))]
    requests = [llm.asker.request(p, **own) for p, own in zip(prompts, each, strict=True)]
    if not requests:
        return []
    with COMPUTING:
        mx.reset_peak_memory()
        front = Front(
            llm,
            config,
            most=min(len(prompts), PARALLEL),
            queue=len(prompts),
            like=requests[0],  # others are charged for what they take beyond it
            offline=True,
        )
    waiting = _Waiting(front, [front.accept(request) for request in requests], started)
    heard = _Heard(len(prompts))
    watched = (in_notebook() or sys.stderr.isatty()) if progress is None else progress
    label = f"{len(prompts)} prompts"
    try:
        with progress_bar(label, " tokens", delay=PATIENCE, shown=watched) as bar:
            for news in _steps(front, waiting, heard):
                if on_token:
                    for number, chunk in news:
                        on_token(number, chunk)
                bar(heard.tokens, waiting.tokens)
    finally:
        with COMPUTING:
            front.service.abandon()
    return [completed(chunks) for chunks in heard.chunks]


def _steps(front: Front, waiting: _Waiting, heard: _Heard) -> Iterator[list[tuple[int, Chunk]]]:
    """What each step brings, until all replies are complete.

    Handed out without the lock: who listens may wait for what another thread computes.
    """
    while waiting or front.service.busy:
        with COMPUTING:
            waiting.hand_over(heard)
            front.service.step()
        news, heard.news = heard.news, []
        yield news


class _Waiting:
    """Requests whose turn has not come: nothing is made for them before.

    Handed over in the order in which a scheduler that knew all of them would admit them.

    Attributes:
        tokens: that all of them may draw.
    """

    def __init__(self, front: Front, accepted: Sequence[Accepted], started: float) -> None:
        self._front, self._accepted, self._started = front, accepted, started
        self.tokens = sum(each.limit for each in accepted)
        ranks = [i - LEAD * each.request.priority for i, each in enumerate(accepted)]
        self._order = deque(sorted(range(len(accepted)), key=ranks.__getitem__))

    def __bool__(self) -> bool:
        return bool(self._order)

    def hand_over(self, heard: _Heard) -> None:
        """Submit as many as may be live beside those that are."""
        scheduler = self._front.service.scheduler
        while self._order and scheduler.live + scheduler.waiting < scheduler.rows:
            number = self._order.popleft()
            listener = partial(heard.hear, number)
            self._front.submit(self._accepted[number], self._started, listener)


class _Heard:
    """What the replies are so far.

    Attributes:
        chunks: of each prompt.
        news: numbers of prompts and chunks that have not been told.
        tokens: drawn for all of them.
    """

    def __init__(self, count: int) -> None:
        self.chunks: list[list[Chunk]] = [[] for _ in range(count)]
        self.news: list[tuple[int, Chunk]] = []
        self.tokens = 0

    def hear(self, number: int, item: Chunk | MlxrunError) -> None:
        """Take in a chunk of a reply.

        Raises:
            MlxrunError: the item is what the prompt failed with.
        """
        if not isinstance(item, Chunk):
            raise item
        self.chunks[number].append(item)
        self.news.append((number, item))
        self.tokens += len(item.tokens)


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
