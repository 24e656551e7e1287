"""``mlxrun kernels``: the kernels for GGUF blocks on this machine, and their test."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from mlxrun.cli.console import Bar, Table, json_of, note, show
from mlxrun.cli.options import Command, with_json

if TYPE_CHECKING:
    from converters.gguf.types import GGMLType
    from mlxrun.kernels.selftest import Result, Subject

NOT_ON_METAL = "Metal's and CUDA's kernels cannot run here; not yet run on Apple hardware"
WITHOUT = "without them weights are repacked or expanded: more memory, slower on a CPU"
NO_COMPILER = (
    "a C++ compiler, to compile kernels once (apt install g++, or xcode-select --install), or the "
    "package mlxrun-kernels, which has them compiled"
)


@click.command("kernels", cls=Command)
@click.option(
    "--selftest",
    is_flag=True,
    help="Compare every kernel with dequantize-and-multiply, and time it against the form that is "
    "used without it. On a GPU, kernels serve only once a test of all types has passed, and for "
    "the types that they make faster.",
)
@click.option(
    "--type",
    "names",
    multiple=True,
    metavar="TYPE",
    help="With --selftest: only this GGML type, such as Q4_K; may be repeated.",
)
@click.option(
    "--size",
    type=click.IntRange(256, 1 << 14),
    default=4096,
    show_default=True,
    help="With --selftest: rows and columns of the matrices, rounded down to a multiple of 256.",
)
@with_json
def kernels_command(selftest: bool, names: tuple[str, ...], size: int, as_json: bool) -> None:
    """Show and test the kernels for GGUF blocks on this machine.

    Kernels multiply with a matrix as the blocks of its GGUF file, without repacking: compiled C++
    on a CPU, Metal or CUDA on a GPU.

    \b
    Examples:
      mlxrun kernels
      mlxrun kernels --selftest
      mlxrun kernels --selftest --type Q4_K --type Q6_K
    """
    if selftest:
        _test(_kinds(names), size - size % 256, as_json)
    else:
        _show(as_json)


def _kinds(names: Sequence[str]) -> list[GGMLType]:
    from mlxrun.kernels.selftest import TYPES

    known = {kind.name: kind for kind in TYPES}
    for name in names:
        if name.upper() not in known:
            raise click.BadParameter(
                f"{name!r} is not one of {', '.join(known)}", param_hint="--type"
            )
    return [known[name.upper()] for name in names]


def _show(as_json: bool) -> None:
    facts = _facts()
    if as_json:
        print(json_of(facts))
        return
    rows = [
        (name.replace("_", " "), ", ".join(value) if isinstance(value, list) else str(value))
        for name, value in facts.items()
        if value
    ]
    show(Table(rows=rows))


def _facts() -> dict[str, Any]:
    """Facts by name: words, or lists of words."""
    from mlxrun.kernels import gpu
    from mlxrun.kernels.machine import SWITCH, machine

    facts = {
        "device": "CPU" if gpu.language() is None else gpu.device_name(),
        "processor": machine(),
    }
    if os.environ.get(SWITCH) == "0":
        return {**facts, "missing": [f"kernels are switched off by {SWITCH}=0", WITHOUT]}
    return {**facts, **_cpu_facts(), **_gpu_facts()}


def _cpu_facts() -> dict[str, Any]:
    from mlxrun.kernels import gpu
    from mlxrun.kernels.dispatch import status
    from mlxrun.kernels.machine import SWITCH

    there = status(gpu.TYPES.keys() | gpu.FLOATS.keys())
    where: dict[str, list[str]] = {"shipped": [], "cached": [], "to be compiled": []}
    for name, place in there.objects.items():
        where[place].append(name)
    others = [name for name in there.runnable if name != there.isa]
    helpless = where["to be compiled"] and there.compiler is None
    return {
        "instructions": there.isa,
        "other_instructions": [f"{name} ({SWITCH}={name})" for name in others],
        "threads": there.threads,
        "pinned": "each thread on a core of its own" if there.pinned else None,
        "compiler": there.compiler or "none",
        "cache": str(there.cache),
        **{name.replace(" ", "_"): objects for name, objects in where.items()},
        "missing": [NO_COMPILER, WITHOUT] if helpless else [],
    }


def _gpu_facts() -> dict[str, Any]:
    from mlxrun.kernels import gpu
    from mlxrun.kernels.selftest import kept

    device = gpu.language()
    if device is None:
        return {"gpu": NOT_ON_METAL}
    passed = kept(gpu.device_name())
    if passed is None:
        return {
            "gpu": f"{device.name} kernels are off until 'mlxrun kernels --selftest' has passed"
        }
    served = sorted(kind.name for kind in passed.served())
    return {
        "gpu": f"{device.name} kernels passed on {passed.date}",
        "multiplied_as_they_are": served or "no type: repacked ones are faster",
    }


def _subject(kinds: Sequence[GGMLType]) -> Subject:
    """The kernels to test."""
    from converters.quantize.policy import Policy
    from mlxrun.errors import KernelsError
    from mlxrun.kernels import gpu
    from mlxrun.kernels.dispatch import Missing, available
    from mlxrun.kernels.selftest import CPU_WAYS, GPU_WAYS, Subject

    device = gpu.language()
    if device is not None:
        made = {"blocks": gpu.Kernels(device, fused=gpu.TYPES), "expanded": gpu.Kernels(device)}
        return Subject(gpu.device_name(), made, GPU_WAYS, Policy("near", "float16", factors=True))
    found = available(kinds, note)
    if isinstance(found, Missing):
        raise KernelsError(f"no kernels to test: {found.reason}")
    return Subject("CPU", {"blocks": found}, CPU_WAYS, Policy("exact", "float32", packed=False))


def _test(kinds: Sequence[GGMLType], size: int, as_json: bool) -> None:
    from mlxrun.kernels import gpu, selftest

    subject = _subject(kinds or selftest.TYPES)
    whole = gpu.language() is not None and not kinds
    if whole:  # until it has passed again: a kernel may end this process
        selftest.forget()
    with Bar("Testing kernels", unit="types", delay=0) as bar:
        results = selftest.run(
            subject, kinds or selftest.TYPES, rows=size, columns=size, progress=bar
        )
    passed = all(result.passed for result in results)
    if whole and passed:
        selftest.keep(subject.device, results)
    if as_json:
        types = [
            {
                "type": result.kind.name,
                "passed": result.passed,
                "rows_equal": result.equal,
                "errors": result.errors,
                "seconds": result.seconds,
                "problem": result.problem,
            }
            for result in results
        ]
        print(json_of({"device": subject.device, "passed": passed, "types": types}))
    else:
        _print(subject, results)
    if not passed:
        click.get_current_context().exit(1)


def _print(subject: Subject, results: Sequence[Result]) -> None:
    from mlxrun.kernels.selftest import WORKS

    rows: list[dict[str, str]] = []
    for result in results:
        if result.problem is None:
            row = {"type": result.kind.name, "rows": "equal" if result.equal else "WRONG"}
            for way in (each.name for each in subject.ways):
                wrong = " WRONG" if way in result.wrong else ""
                row[f"#{way}"] = f"{result.errors[way]:.0e}{wrong}"
            rows.append(row | {f"#{work.name}": _times(result, work.name) for work in WORKS})
    show(f"{subject.device}: each type's errors by the way activations are multiplied, and times")
    show("of its kernels with how many times as long the form takes that is used without them.")
    show("")
    if rows:
        show(Table.of("", rows), "")
    for result in results:
        if result.problem is not None:
            show(f"{result.kind.name} cannot run: {result.problem}")
    failed = [result.kind.name for result in results if not result.passed]
    show(f"wrong: {', '.join(failed)}" if failed else f"all {len(results)} types passed")
    if subject.device == "CPU":
        show(NOT_ON_METAL)


def _times(result: Result, work: str) -> str:
    """The fastest kernel's time, and the ratio."""
    times = dict(result.seconds[work])
    repacked = times.pop("repacked")
    name = min(times, key=times.__getitem__)
    shown = f"{times[name] * 1e6:.0f} us {repacked / times[name]:.2f}x"
    return shown if name == "blocks" else f"{shown} {name}"
