"""Many prompts to their ends, together."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Unpack

import mlx.core as mx

from mlxrun.config import CacheConfig, EngineConfig, StorageOptions, check_callback, known, names_of
from mlxrun.display import in_notebook, progress_bar
from mlxrun.engine.engine import BATCH_PARALLEL, Engine
from mlxrun.engine.input import InputProcessor, Prompt
from mlxrun.errors import ParameterError
from mlxrun.outputs import BatchOptions, Chunk, Completion, completed

OnToken = Callable[[int, Chunk], None]

# Seconds before a progress bar appears.
PATIENCE = 2.0
# What holds for all requests of a batch.
_SHARED = ("parallel", "context", "deterministic", "stall", "prefix_bytes")
# Options with one value for all prompts, or a list with a value for each.
_EACH = (
    *("max_tokens", "temperature", "seed", "priority", "deadline", "params", "ignore_eos"),
    *names_of(StorageOptions),
)


def batch(
    inputs: InputProcessor,
    make_engine: Callable[[EngineConfig, CacheConfig, int], Engine],
    prompts: Sequence[Prompt],
    *,
    on_token: OnToken | None = None,
    progress: bool | None = None,
    **options: Unpack[BatchOptions],
) -> list[Completion]:
    """Continue many prompts together.

    Args:
        inputs: the model, its tokenizer and its defaults.
        make_engine: called with a config, the KV cache that memory is planned for, and the most
            sequences at once where the config does not say.
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
        MemoryLimitError: a prompt can never fit, or ``parallel`` and ``context`` do not.
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
    requests = [inputs.request(p, **own) for p, own in zip(prompts, each, strict=True)]
    if not requests:
        return []
    config = replace(config, queue=len(requests))
    cache = config.cache.overridden(requests[0])
    engine = make_engine(config, cache, min(len(requests), BATCH_PARALLEL))
    mx.reset_peak_memory()
    sequences = [engine.prepare(request, started=started) for request in requests]
    numbers = {sequence: number for number, sequence in enumerate(sequences)}
    read, tokens, limit = [0] * len(sequences), 0, sum(sequence.limit for sequence in sequences)
    watched = (in_notebook() or sys.stderr.isatty()) if progress is None else progress
    label = f"{len(prompts)} prompts"
    with progress_bar(label, " tokens", delay=PATIENCE, shown=watched) as bar:
        for news in engine.run(sequences):
            for sequence in news:
                if sequence.error is not None:
                    raise sequence.error
                number = numbers[sequence]
                for chunk in sequence.chunks[read[number] :]:
                    read[number] += 1
                    tokens += len(chunk.tokens)
                    if on_token:
                        on_token(number, chunk)
            bar(tokens, limit)
    return [completed(sequence.chunks) for sequence in sequences]


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
