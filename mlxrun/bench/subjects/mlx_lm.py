"""mlx-lm in the same process, over the same weights in the same form and dtype.

It has no GGUF blocks: where mlxrun multiplies those, mlx-lm gets the same numbers as plain floats,
which are what it multiplies fastest on a CPU.

One sequence runs through its ``generate_step``, several through its ``BatchGenerator``: what its
``stream_generate`` and ``batch_generate`` are made of, without making text.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, generate_step, generation_stream
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import dequantize_model, load_model

from mlxrun.bench.results import Run
from mlxrun.bench.subjects.meter import Meter
from mlxrun.bench.workload import Decode, FirstToken, Prefill, Ragged, Workload, token_ids
from mlxrun.computing import COMPUTING
from mlxrun.conversion import convert
from mlxrun.errors import MemoryLimitError, RivalError, UnsupportedArchitectureError
from mlxrun.memory.device import room

if TYPE_CHECKING:
    from mlxrun.llm import LLM

# Weights that take so much more memory than theirs are held plain.
_PLAIN = 1.2
# Characters of a message.
_TOLD = 160
_HINT = "Measure without --against mlx-lm"


@contextmanager
def opened(llm: LLM, path: Path) -> Iterator[MlxLm]:
    """mlx-lm with the weights of a model that mlxrun has loaded.

    Args:
        llm: the model.
        path: where it came from; a GGUF is converted to a temporary directory first.

    Raises:
        UnsupportedArchitectureError: mlx-lm cannot load it.
        OutOfSpaceError: there is no room for the temporary directory.
        MemoryLimitError: there is no room for the weights a second time.
    """
    available = room() - mx.get_active_memory()
    plain = llm.model.dtype.size * llm.report.elements if llm.products and llm.report else 0
    needed = max(plain, llm.model.nbytes)
    if room() and available < needed:
        hint = "Measure a smaller model, or without --against mlx-lm"
        raise MemoryLimitError(needed, available, "a second copy of the weights", hint)
    with TemporaryDirectory(prefix="mlxrun-bench-") as folder:
        if path.is_file():
            target = Path(folder) / "model"
            convert(path, target, policy=llm.report.policy if llm.report else None)
            path = target
        started = time.perf_counter()
        try:
            model, _ = load_model(path)
        except Exception as error:  # whatever its classes raise
            raise UnsupportedArchitectureError(
                f"mlx-lm cannot load {llm.source}: {error}", hint="Measure without --against mlx-lm"
            ) from error
        seconds = time.perf_counter() - started
        form = _same_form(model, llm)
        mx.eval(model.parameters())
    yield MlxLm(model, llm.model.vocab_size, seconds, form)


def _same_form(model: Any, llm: LLM) -> str:
    """Hold weights as mlxrun holds them: plain where it does or has blocks, and in its dtype."""
    expanded = llm.products is not None or llm.model.nbytes > _PLAIN * _nbytes(model)
    model.set_dtype(llm.model.dtype)  # scales first: they decide how products with them round
    if expanded:
        dequantize_model(model)
    model.eval()
    dtype = str(llm.model.dtype).removeprefix("mlx.core.")
    return f"{dtype}, {_nbytes(model) / 1e6:.1f} MB of weights"


def _nbytes(model: Any) -> int:
    from mlx.utils import tree_flatten

    named: Any = tree_flatten(model.parameters())
    return sum(array.nbytes for _, array in named)


class MlxLm:
    """A model of mlx-lm's.

    Args:
        model: as its ``load_model`` gives it.
        vocabulary: token ids that prompts may hold.
        load_seconds: what loading took, a conversion apart.
        about: how it holds its weights.
    """

    name = "mlx-lm"

    def __init__(self, model: Any, vocabulary: int, load_seconds: float, about: str) -> None:
        self._model, self._vocabulary = model, vocabulary
        self.load_seconds, self.about = load_seconds, about
        self._meter = Meter(_nbytes(model))
        self._context, self._filled = 0, make_prompt_cache(model)

    def can(self, workload: Workload) -> bool:
        return True

    def run(self, workload: Workload) -> Run:
        with COMPUTING:
            if isinstance(workload, Prefill | Decode):
                self._fill(workload.context)
            self._meter.begin()
            try:
                match workload:
                    case Prefill():
                        return self._single(workload.prompt, 0)
                    case Decode(parallel=1):
                        return self._single(1, workload.predict)
                    case Decode():
                        return self._together(workload)
                    case Ragged():
                        return self._ragged(workload)
                return self._first_token(workload)
            except RuntimeError as error:  # MLX's
                raise RivalError(
                    f"mlx-lm failed in {workload.name}: {shorten(str(error), _TOLD)}", hint=_HINT
                ) from error
            finally:
                mx.synchronize(generation_stream)  # it queues a step that nobody reads

    def _single(self, prompt: int, predict: int) -> Run:
        cache, ids = copy.deepcopy(self._filled), mx.array(self._ids(prompt, seed=1))

        def work() -> int:
            steps = generate_step(ids, self._model, max_tokens=predict, prompt_cache=cache)
            for drawn, _ in enumerate(steps, 1):
                if drawn == predict:  # else it waits for one token more
                    break
            return _stored(cache)

        return self._meter.time(work)

    def _together(self, workload: Decode) -> Run:
        rows = workload.parallel
        generator: Any = BatchGenerator(
            self._model, completion_batch_size=rows, prefill_batch_size=rows
        )
        prompts = [[last] for last in self._ids(rows, seed=1)]
        caches = [copy.deepcopy(self._filled) for _ in prompts]
        generator.insert(prompts, [workload.predict] * rows, caches=caches)

        def work() -> int:
            steps = kv_bytes = 0
            while generator.next_generated():
                steps += 1
                if steps == workload.predict - 1:
                    kv_bytes = generator.prompt_cache_nbytes
            return kv_bytes

        return self._meter.time(work)

    def _ragged(self, workload: Ragged) -> Run:
        generator: Any = BatchGenerator(self._model)
        prompts = [self._ids(count, seed) for seed, count in enumerate(workload.prompts)]

        def work() -> int:
            generator.insert(prompts, list(workload.replies))
            while generator.next_generated():
                pass
            return 0

        return self._meter.time(work)

    def _first_token(self, workload: FirstToken) -> Run:
        generator: Any = BatchGenerator(self._model)

        def work() -> int:
            if workload.behind:
                generator.insert([self._ids(workload.behind, seed=2)], [1])
                generator.next()  # reads of the long prompt as much as it reads at once
            (short,) = generator.insert([self._ids(workload.prompt, seed=1)], [1])
            while all(response.uid != short for response in generator.next_generated()):
                pass
            return 0

        return self._meter.time(work)

    def _fill(self, context: int) -> None:
        """Have a cache that holds so many tokens, for copies of it to be used."""
        if self._context == context:
            return
        self._context, self._filled = context, make_prompt_cache(self._model)
        if context:
            ids = mx.array(self._ids(context))
            list(generate_step(ids, self._model, max_tokens=0, prompt_cache=self._filled))
            mx.synchronize(generation_stream)

    def _ids(self, count: int, seed: int = 0) -> list[int]:
        return token_ids(count, self._vocabulary, seed)


def _stored(cache: Sequence[Any]) -> int:
    return sum(int(getattr(layer, "nbytes", 0)) for layer in cache)
