"""The processor: its instruction sets and cores."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from mlxrun.errors import KernelsError, ParameterError

__all__ = ["ISA", "ISAS", "chosen_isa", "pinned", "runnable_isas", "thread_count"]

SWITCH: Final = "MLXRUN_KERNELS"  # 0, or the name of an instruction set
THREADS: Final = "MLXRUN_THREADS"
PINNED: Final = "MLXRUN_PIN_THREADS"
_MOST_THREADS: Final = 1024
_CPUS: Final = Path("/sys/devices/system/cpu")
_CPUINFO: Final = Path("/proc/cpuinfo")
_QUOTA: Final = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class ISA:
    """An instruction set that kernels are compiled for.

    Attributes:
        machine: of processors that have it, as :func:`machine` says; "" for all.
        features: required of the processor, as Linux or macOS name them.
        flags: of the compiler.
    """

    name: str
    machine: str
    features: frozenset[str]
    flags: tuple[str, ...]


_AVX2_FLAGS: Final = ("-mavx2", "-mfma", "-mf16c", "-mbmi2")
_AVX2: Final = frozenset({"avx2", "fma", "f16c", "bmi2"})
_AVX512: Final = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"})

#: Best first.
ISAS: Final = (
    ISA(
        "avx512",
        "x86_64",
        _AVX2 | _AVX512,
        (*(f"-m{feature.replace('_', '')}" for feature in sorted(_AVX512)), *_AVX2_FLAGS),
    ),
    ISA("avx2", "x86_64", _AVX2, _AVX2_FLAGS),
    ISA("i8mm", "arm64", frozenset({"dotprod", "i8mm"}), ("-march=armv8.2-a+dotprod+i8mm",)),
    ISA("neon", "arm64", frozenset({"dotprod"}), ("-march=armv8.2-a+dotprod",)),
    ISA("portable", "", frozenset(), ()),
)

# Other names of features.
_RENAMED: Final = {"asimddp": "dotprod", "avx512vnni": "avx512_vnni"}
_MAC_ARM: Final = {"FEAT_DotProd": "dotprod", "FEAT_I8MM": "i8mm"}


def machine() -> str:
    """The kind of processor: "x86_64", "arm64" or another."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "aarch64": "arm64"}.get(name, name)


def isas_of(kind: str, features: Iterable[str]) -> tuple[ISA, ...]:
    """Instruction sets of a processor with some features, best first."""
    present = frozenset(features)
    return tuple(isa for isa in ISAS if isa.machine in ("", kind) and isa.features <= present)


@cache
def runnable_isas() -> tuple[ISA, ...]:
    """Instruction sets of this processor, best first."""
    return isas_of(machine(), _features())


def chosen_isa() -> ISA:
    """The instruction set that ``MLXRUN_KERNELS`` names, else the best one.

    Raises:
        KernelsError: it is unknown, or this processor does not have it.
    """
    name, runnable = os.environ.get(SWITCH, ""), runnable_isas()
    if name in ("", "1"):
        return runnable[0]
    for isa in runnable:
        if isa.name == name:
            return isa
    known = any(isa.name == name for isa in ISAS)
    raise KernelsError(
        f"{SWITCH}={name[:50]}: "
        + ("this processor lacks these instructions" if known else "no such instruction set"),
        hint=f"Here there are {', '.join(isa.name for isa in runnable)}, and 0 for none",
    )


def _features() -> set[str]:
    if sys.platform == "darwin":
        return _mac_features()
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    return features_in(text)


def features_in(cpuinfo: str) -> set[str]:
    """The features of the first processor in the text of Linux's /proc/cpuinfo."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return {_RENAMED.get(feature, feature) for feature in value.split()}
    return set()


def _mac_features() -> set[str]:
    if machine() == "arm64":
        return {ours for name, ours in _MAC_ARM.items() if _sysctl(f"hw.optional.arm.{name}")}
    names = _AVX2 | _AVX512
    found = {name for name in names if _sysctl(f"hw.optional.{name.replace('_', '')}")}
    # macOS calls these by other names; every processor with AVX2 has them.
    return found | {"fma", "f16c", "bmi2"} if _sysctl("hw.optional.avx2_0") else found


def _sysctl(name: str) -> int:
    """A number of macOS's; 0 if there is none of that name."""
    value, size = ctypes.c_int64(0), ctypes.c_size_t(8)
    call = ctypes.CDLL(None).sysctlbyname
    failed = call(name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
    return 0 if failed else value.value


def thread_count() -> int:
    """Threads of the pool: ``MLXRUN_THREADS``, else one for each physical core we may use.

    Raises:
        ParameterError: the variable is no number of threads.
    """
    text = os.environ.get(THREADS, "")
    if text:
        if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= _MOST_THREADS:
            raise ParameterError(THREADS, text, f"a number from 1 to {_MOST_THREADS}")
        return int(text)
    if sys.platform == "darwin":  # efficiency cores would hold up the others
        return max(_sysctl("hw.perflevel0.physicalcpu") or _sysctl("hw.physicalcpu"), 1)
    allowed = sorted(os.sched_getaffinity(0))
    return max(min(len({_core(cpu) for cpu in allowed}), _quota(len(allowed))), 1)


def pinned() -> bool:
    """Whether each thread keeps to one core: ``MLXRUN_PIN_THREADS=1``."""
    return os.environ.get(PINNED, "0") not in ("", "0")


def _core(cpu: int) -> tuple[str, ...]:
    """The physical core of a logical one; itself where Linux does not say."""
    topology = _CPUS / f"cpu{cpu}" / "topology"
    try:
        names = ("physical_package_id", "core_id")
        return tuple((topology / name).read_text(encoding="ascii").strip() for name in names)
    except (OSError, UnicodeDecodeError):
        return (str(cpu),)


def _quota(otherwise: int) -> int:
    """Processors that a container may use, rounded up."""
    try:
        allowed, period = _QUOTA.read_text(encoding="ascii").split()
        return otherwise if allowed == "max" else -(-int(allowed) // int(period))
    except (OSError, ValueError):
        return otherwise
