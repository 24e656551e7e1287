"""Runtimes to measure mlxrun against: mlx-lm in this process, and llama.cpp's ``llama-bench``."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator, generate_step, generation_stream
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import dequantize_model, load_model

from mlxrun.bench.runner import Run
from mlxrun.bench.runtimes import InProcessRuntime, Work
from mlxrun.bench.workloads import Decode, FirstToken, Prefill, Ragged, Workload
from mlxrun.conversion import convert
from mlxrun.errors import (
    BaselineError,
    MemoryLimitError,
    ParameterError,
    UnsupportedArchitectureError,
)
from mlxrun.memory.device import room

if TYPE_CHECKING:
    from mlxrun.llm import LLM

LLAMA_BENCH = "llama-bench"
_HINT = "Measure without --against mlx-lm"
# Weights that are so many times as large as mlx-lm's are plain, not packed.
_PLAIN = 1.2


@contextmanager
def mlx_lm_runtime(llm: LLM, path: Path) -> Iterator[MLXLMRuntime]:
    """mlx-lm with the weights of a loaded model, in the same form and dtype.

    It has no GGUF blocks: where mlxrun multiplies those, mlx-lm gets the same numbers as plain
    floats, which it multiplies fastest on a CPU.

    Args:
        llm: the model.
        path: its source; a GGUF is converted to a temporary directory first.
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
        except Exception as error:  # mlx-lm's classes raise anything
            raise UnsupportedArchitectureError(
                f"mlx-lm cannot load {llm.source}: {error}", hint=_HINT
            ) from error
        seconds = time.perf_counter() - started
        _match_weights(model, llm)
        mx.eval(model.parameters())
    yield MLXLMRuntime(model, llm.model.vocab_size, llm.model.dtype, seconds)


def _match_weights(model: Any, llm: LLM) -> None:
    """Give mlx-lm's weights the form and dtype of mlxrun's."""
    plain = llm.products is not None or llm.model.nbytes > _PLAIN * _nbytes(model)
    model.set_dtype(llm.model.dtype)  # scales first: they decide how products with them round
    if plain:
        dequantize_model(model)
    model.eval()


def _nbytes(model: Any) -> int:
    arrays: Any = tree_flatten(model.parameters())
    return sum(array.nbytes for _, array in arrays)


class MLXLMRuntime(InProcessRuntime):
    """A model of mlx-lm's: ``generate_step`` for one sequence, ``BatchGenerator`` for several."""

    name = "mlx-lm"
    prefill_tokens = 0  # it computes the first one nevertheless

    def __init__(self, model: Any, vocab_size: int, dtype: mx.Dtype, load_seconds: float) -> None:
        super().__init__(vocab_size, _nbytes(model), dtype, load_seconds)
        self._model = model
        self._context, self._filled = 0, make_prompt_cache(model)

    def run(self, workload: Workload) -> Run:
        try:
            return super().run(workload)
        except RuntimeError as error:  # MLX's
            raise BaselineError(
                f"mlx-lm failed in {workload.name}: {shorten(str(error), 160)}", hint=_HINT
            ) from error
        finally:
            mx.synchronize(generation_stream)  # it queues one step more

    def _fill(self, context: int) -> None:
        if self._context == context:
            return
        self._context, self._filled = context, make_prompt_cache(self._model)
        if context:
            ids = mx.array(self._ids(context))
            list(generate_step(ids, self._model, max_tokens=0, prompt_cache=self._filled))
            mx.synchronize(generation_stream)

    def _generate(self, prompt: int, predict: int) -> Work:
        cache, ids = copy.deepcopy(self._filled), mx.array(self._ids(prompt, seed=1))

        def work() -> int:
            steps = generate_step(ids, self._model, max_tokens=predict, prompt_cache=cache)
            for count, _ in enumerate(steps, 1):
                if count == predict:  # else it waits for one token more
                    break
            return sum(int(getattr(layer, "nbytes", 0)) for layer in cache)

        return work

    def _decode_together(self, workload: Decode) -> Work:
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

        return work

    def _serve(self, workload: Ragged) -> Work:
        generator: Any = BatchGenerator(self._model)
        prompts = self._prompts(workload)

        def work() -> int:
            generator.insert(prompts, list(workload.completions))
            while generator.next_generated():
                pass
            return 0

        return work

    def _first_token(self, workload: FirstToken) -> Work:
        generator: Any = BatchGenerator(self._model)

        def work() -> int:
            if workload.behind:
                generator.insert([self._ids(workload.behind, seed=2)], [1])
                generator.next()  # prefills the first chunk of the long prompt
            (short,) = generator.insert([self._ids(workload.prompt, seed=1)], [1])
            while all(response.uid != short for response in generator.next_generated()):
                pass
            return 0

        return work


class LlamaBenchRuntime:
    """llama.cpp with a GGUF as it is: one ``llama-bench`` for each run, so that runs take turns.

    Its own warm-up and the loading of the model are not in the times that it prints.

    Args:
        path: the file, or the first shard of a split one.
    """

    name = LLAMA_BENCH
    load_seconds: float | None = None

    def __init__(self, path: Path) -> None:
        binary = shutil.which(LLAMA_BENCH)
        if binary is None:
            hint = "Install llama.cpp, or measure without it"
            raise BaselineError(f"{LLAMA_BENCH} is not on the path", hint=hint)
        if path.is_dir():
            raise ParameterError("model", path.name, "a GGUF file, for llama-bench")
        self._binary, self._path = binary, path
        self.about = "weights as in the file"

    def can(self, workload: Workload) -> bool:
        return isinstance(workload, Prefill | Decode) and workload.parallel == 1

    def run(self, workload: Workload) -> Run:
        """One run."""
        prompt = workload.prompt if isinstance(workload, Prefill) else 0
        predict = workload.predict if isinstance(workload, Decode) else 0
        assert isinstance(workload, Prefill | Decode)
        arguments = {"-m": self._path, "-p": prompt, "-n": predict, "-d": workload.context, "-r": 1}
        words = [str(word) for pair in arguments.items() for word in pair]
        test = _parsed(_output([self._binary, *words, "-o", "json"]))
        known = ("build_commit", "backends", "model_type", "n_threads")
        about = [f"{name} {test[name]}" for name in known if test.get(name) not in (None, "")]
        self.about = "weights as in the file, " + ", ".join(about)
        return Run(test["samples_ns"][0] / 1e9)


def _output(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=False
        )
    except OSError as error:
        raise BaselineError(f"{command[0]} cannot be started: {error.strerror}") from error
    if not done.returncode:
        return done.stdout
    last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1][:200]
    code = done.returncode
    how = f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
    raise BaselineError(f"{LLAMA_BENCH} {how}: {last}")


def _parsed(text: str) -> dict[str, Any]:
    """The only test in the output of ``llama-bench -o json``."""
    try:
        (test,) = json.loads(text)
        if test["samples_ns"][0] > 0:
            return dict(test)
    except (ValueError, TypeError, KeyError, IndexError):
        pass
    hint = "Its version may be too old: it must know -o json"
    raise BaselineError(f"{LLAMA_BENCH} answered with no times", hint=hint)
