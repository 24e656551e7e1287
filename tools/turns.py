#!/usr/bin/env python3
"""mlxrun and llama.cpp in turns on one GGUF: prefill of 128, decode, sequences together.

::

    MLXRUN_LLAMA_PYTHON=python-with-llama-cpp-python python tools/turns.py model.gguf --rounds 9

Each measurement is a process of its own, alone on the machine but for what others run: threads of
one runtime that wait busily must not take a core from the other. Prints each round's rates in
tokens a second, then medians and the medians of the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

PROMPT, STEPS, SKIPPED = 128, 56, 8


def rate(count: int, run: Callable[[], object]) -> float:
    """Tokens a second: the median of three runs, after one that is not counted."""
    times = []
    for _ in range(4):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return count / statistics.median(times[1:])


def ours(path: str, together: int) -> dict[str, float]:
    """mlxrun's rates; its options come from the environment (MLXRUN_PRODUCTS)."""
    import mlxrun

    llm, draw = mlxrun.load(path), random.Random(0)
    if together > 1:

        def seconds(steps: int) -> float:
            started = time.perf_counter()
            llm.batch([[7 + i] for i in range(together)], max_tokens=steps, temperature=0)
            return time.perf_counter() - started

        seconds(SKIPPED)
        shorter, longer = seconds(SKIPPED), seconds(STEPS)
        return {"decode": together * (STEPS - SKIPPED) / (longer - shorter)}
    prompts = iter([[draw.randrange(5, 20000) for _ in range(PROMPT)] for _ in range(4)])
    prefill = rate(PROMPT, lambda: llm.generate(next(prompts), max_tokens=1, temperature=0))
    at = [time.perf_counter() for _ in llm.stream("Once upon a time", max_tokens=STEPS, seed=1)]
    gaps = [after - before for before, after in zip(at[SKIPPED:], at[SKIPPED + 1 :], strict=False)]
    return {"prefill": prefill, "decode": 1 / statistics.median(gaps)}


def theirs(path: str, together: int) -> dict[str, float]:
    """llama.cpp's rates, through its Python binding."""
    import llama_cpp

    threads, draw = len(os.sched_getaffinity(0)), random.Random(0)
    options = {"n_threads": threads, "n_threads_batch": threads, "n_batch": 2048, "verbose": False}
    if together > 1:
        return _theirs_together(path, together, threads)
    model = llama_cpp.Llama(path, n_ctx=512, **options)
    ids = [draw.randrange(5, 20000) for _ in range(PROMPT)]

    def read() -> None:
        model.reset()
        model.eval(ids)

    prefill = rate(PROMPT, read)
    model.reset()
    model.eval(ids[:SKIPPED])
    times = []
    for token in ids[SKIPPED:STEPS]:
        started = time.perf_counter()
        model.eval([token])
        times.append(time.perf_counter() - started)
    return {"prefill": prefill, "decode": 1 / statistics.median(times)}


def _theirs_together(path: str, together: int, threads: int) -> dict[str, float]:
    """Sequences that decode in one batch of llama.cpp's."""
    import llama_cpp as lib

    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_seq_max = 512 * together, 2048, together
    params.n_threads = params.n_threads_batch = threads
    context = lib.llama_init_from_model(model, params)
    batch, draw = lib.llama_batch_init(together, 0, 1), random.Random(0)

    def step(position: int) -> None:
        batch.n_tokens = together
        for i in range(together):
            batch.token[i], batch.pos[i] = draw.randrange(5, 20000), position
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, i, 1
        if lib.llama_decode(context, batch):
            raise RuntimeError("llama.cpp could not decode")
        lib.llama_synchronize(context)

    for position in range(SKIPPED):
        step(position)
    started = time.perf_counter()
    for position in range(SKIPPED, STEPS):
        step(position)
    return {"decode": together * (STEPS - SKIPPED) / (time.perf_counter() - started)}


def main() -> None:
    """Take turns, or measure one side for the process that does."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--together", type=int, default=1, help="sequences that decode together")
    parser.add_argument("--side", choices=["mlxrun", "llama.cpp"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        measure = ours if options.side == "mlxrun" else theirs
        print(json.dumps(measure(options.model, options.together)))
        return
    sides = {
        "mlxrun": sys.executable,
        "llama.cpp": os.environ.get("MLXRUN_LLAMA_PYTHON", sys.executable),
    }
    rounds: list[dict[str, dict[str, float]]] = []
    for _ in range(options.rounds):
        found = {}
        for side, python in sides.items():
            command = [python, __file__, options.model, "--side", side]
            command += ["--together", str(options.together)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[side] = json.loads(done.stdout.splitlines()[-1])
            print(side, {kind: round(value, 1) for kind, value in found[side].items()}, flush=True)
        rounds.append(found)
    for kind in rounds[0]["mlxrun"]:
        medians = {side: statistics.median(r[side][kind] for r in rounds) for side in sides}
        ratio = statistics.median(r["mlxrun"][kind] / r["llama.cpp"][kind] for r in rounds)
        shown = ", ".join(f"{side} {value:.1f}" for side, value in medians.items())
        print(f"{kind}: {shown} tokens/s, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
