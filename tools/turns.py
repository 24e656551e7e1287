#!/usr/bin/env python3
"""mlxrun and llama.cpp in turns on one GGUF: prefill of 128, decode, sequences together.

::

    MLXRUN_LLAMA_PYTHON=python-with-llama-cpp-python python tools/turns.py model.gguf --rounds 9

Unlike ``mlxrun bench --against llama-bench``, each measurement is a process of its own, alone on
the machine but for other programs: threads of one runtime that wait busily must not take a core
from the other. Prints each round's rates in tokens/s, then medians and the medians of the ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

PROMPT, PREDICT, REPETITIONS = 128, 64, 3


def output(*command: object) -> Any:
    """The JSON that a command prints."""
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def mlxrun(model: str, parallel: int, products: str) -> dict[str, float]:
    """Rates of ``mlxrun bench``."""
    prompt = PROMPT if parallel == 1 else 0
    lengths = ("-p", prompt, "-n", PREDICT, "-r", REPETITIONS, "--parallel", parallel)
    bench = (sys.executable, "-m", "mlxrun", "bench", model, "--products", products, "--json")
    return {
        "prefill" if "prompt" in result["workload"] else "decode": result["tokens_per_second"][
            "median"
        ]
        for result in output(*bench, *lengths)["results"]
        if result["parallel"] == parallel
    }


def llama_cpp(model: str, parallel: int) -> dict[str, float]:
    """Rates of ``tools/llama-bench``."""
    bench = (sys.executable, Path(__file__).parent / "llama-bench", "-m", model, "-r", REPETITIONS)
    rates = {}
    for kind, option, tokens in (("prefill", "-p", PROMPT), ("decode", "-n", PREDICT)):
        if kind == "decode" or parallel == 1:
            (test,) = output(*bench, option, tokens, "--parallel", parallel)
            rates[kind] = 1e9 * parallel * tokens / statistics.median(test["samples_ns"])
    return rates


def main() -> None:
    """Take turns."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--parallel", type=int, default=1, help="sequences that decode together")
    parser.add_argument("--products", default="near", help="as mlxrun has it")
    options = parser.parse_args()
    rounds = []
    for _ in range(options.rounds):
        rates = {
            "mlxrun": mlxrun(options.model, options.parallel, options.products),
            "llama.cpp": llama_cpp(options.model, options.parallel),
        }
        for name, found in rates.items():
            shown = ", ".join(f"{kind} {rate:.1f}" for kind, rate in found.items())
            print(f"{name}: {shown}", flush=True)
        rounds.append(rates)
    for kind in rounds[0]["mlxrun"]:
        medians = {name: statistics.median(r[name][kind] for r in rounds) for name in rounds[0]}
        ratio = statistics.median(r["mlxrun"][kind] / r["llama.cpp"][kind] for r in rounds)
        shown = ", ".join(f"{name} {rate:.1f}" for name, rate in medians.items())
        print(f"{kind}: {shown} tokens/s, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
