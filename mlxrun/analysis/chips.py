"""Published memory, bandwidth and throughput of chips, each figure with its source.

The source is the maker's page where one was found. Throughput is that of dense products of
half-precision matrices with sums in float32: half of a page's figure for sparse ones. For most of
Apple's chips it is an estimate from cores and clock. Where sources contradict one another there is
no figure, and without a bandwidth no chip.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from mlxrun.analysis.costs import Roof
from mlxrun.errors import ParameterError

ALL = "all"
ESTIMATED = "estimated"


@dataclass(frozen=True)
class Chip:
    """One chip, in its largest configuration."""

    name: str
    bandwidth: float  # GB/s (10^9 bytes/s)
    memory: int  # GB
    source: str  # address of bandwidth and memory
    tflops: float | None = None  # 10^12 FLOPs/s in half precision; None where there is no figure
    tflops_source: str = ""  # address, or how it was estimated

    @property
    def key(self) -> str:
        """The name on the command line: ``m1-pro``."""
        return _key(self.name)

    @property
    def roof(self) -> Roof:
        return Roof(self.bandwidth * 1e9, None if self.tflops is None else self.tflops * 1e12)


def _key(name: str) -> str:
    return re.sub(r"[ _]+", "-", name.strip().lower())


def _estimate(cores: int, gigahertz: float, clock: str) -> tuple[float, str]:
    """Estimated throughput of an Apple GPU of the M1 to the M3, and the estimate's formula."""
    lanes, flops = 128, 2
    how = (
        f"{ESTIMATED}: {cores} cores x {lanes} lanes x {flops} FLOPs x {gigahertz} GHz, halves as "
        f"fast as singles (https://github.com/philipturner/metal-benchmarks); clock: {clock}"
    )
    return round(cores * lanes * flops * gigahertz / 1e3, 1), how


_NEWS = "https://www.apple.com/newsroom"
_M1 = f"{_NEWS}/2020/11/apple-unleashes-m1/"
_M1_PRO = (
    f"{_NEWS}/2021/10/introducing-m1-pro-and-m1-max-the-most-powerful-chips-apple-has-ever-built/"
)
_M1_ULTRA = (
    f"{_NEWS}/2022/03/apple-unveils-m1-ultra-the-worlds-most-powerful-chip-for-a-personal-computer/"
)
_M2 = f"{_NEWS}/2022/06/apple-unveils-m2-with-breakthrough-performance-and-capabilities/"
_M2_PRO = (
    f"{_NEWS}/2023/01/"
    "apple-unveils-m2-pro-and-m2-max-next-generation-chips-for-next-level-workflows/"
)
_M2_ULTRA = f"{_NEWS}/2023/06/apple-introduces-m2-ultra/"
_M3 = "https://support.apple.com/en-us/117735"
_M3_PRO = "https://support.apple.com/en-us/117736"
_M3_ULTRA = "https://english.worldmagazine.it/431260"
_M4 = f"{_NEWS}/2024/10/apple-introduces-m4-pro-and-m4-max/"
_M5 = f"{_NEWS}/2025/10/apple-unleashes-m5-the-next-big-leap-in-ai-performance-for-apple-silicon/"
_MACS_2026 = "https://github.com/rlindsey2/sunkcost/blob/main/data/hardware.json"
_M1_CLOCK = "https://hmc-tech.com/gpu/apple-8-core-m4-fl-vs-apple-24-core-m1-max"
_M2_CLOCK = "https://hmc-tech.com/gpu/apple-30-core-m2-max-vs-apple-8-core-m1"
_M3_CLOCK = "https://hmc-tech.com/gpu/apple-32-core-m4-max-vs-apple-40-core-m3-max"

# Sources name clocks from 1.47 to 1.68 GHz for the GPUs of the M4, and none the throughput of the
# matrix units that GPUs have since the M5.
APPLE = (
    Chip("M1", 68.3, 16, "https://en.wikipedia.org/wiki/Apple_M1", 2.6, _M1),
    Chip("M1 Pro", 200, 32, _M1_PRO, *_estimate(16, 1.296, _M1_CLOCK)),
    Chip("M1 Max", 400, 64, _M1_PRO, *_estimate(32, 1.296, _M1_CLOCK)),
    Chip("M1 Ultra", 800, 128, _M1_ULTRA, *_estimate(64, 1.296, _M1_CLOCK)),
    Chip("M2", 100, 24, _M2, *_estimate(10, 1.398, _M2_CLOCK)),
    Chip("M2 Pro", 200, 32, _M2_PRO, *_estimate(19, 1.398, _M2_CLOCK)),
    Chip("M2 Max", 400, 96, _M2_PRO, *_estimate(38, 1.398, _M2_CLOCK)),
    Chip("M2 Ultra", 800, 192, _M2_ULTRA, *_estimate(76, 1.398, _M2_CLOCK)),
    Chip("M3", 100, 24, _M3, *_estimate(10, 1.398, _M3_CLOCK)),
    Chip("M3 Pro", 150, 36, _M3_PRO, *_estimate(18, 1.398, _M3_CLOCK)),
    Chip("M3 Max", 400, 128, _M3_PRO, *_estimate(40, 1.398, _M3_CLOCK)),
    Chip("M3 Ultra", 819, 512, _M3_ULTRA, *_estimate(80, 1.398, _M3_CLOCK)),
    Chip("M4", 120, 32, _M4),
    Chip("M4 Pro", 273, 64, _M4),
    Chip("M4 Max", 546, 128, _M4),
    Chip("M5", 153, 32, _M5),
    Chip("M5 Pro", 307, 64, _MACS_2026),
    Chip("M5 Max", 614, 128, _MACS_2026),
    Chip("M5 Ultra", 1200, 512, _MACS_2026),
    Chip("M6", 170, 32, _MACS_2026),
)

_IMAGES = "https://images.nvidia.com/aem-dam"
_DATA_CENTER = "https://www.nvidia.com/en-us/data-center"
_AMPERE = f"{_IMAGES}/en-zz/Solutions/data-center/nvidia-ampere-architecture-whitepaper.pdf"
_A100 = (
    "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/"
    "nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
)
_H100 = f"{_DATA_CENTER}/h100/"
_H200 = f"{_DATA_CENTER}/h200/"
_L40S = f"{_DATA_CENTER}/l40s/"
_L4 = f"{_DATA_CENTER}/l4/"
_GA102 = (
    "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.1.pdf"
)
_ADA = f"{_IMAGES}/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
_BLACKWELL = f"{_IMAGES}/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"
_SPARK = (
    "https://groundy.com/articles/"
    "the-rtx-spark-bet-on-unified-memory-for-local-llms-where-bandwidth-caps/"
)

# Pages about the B200 name from 7.7 to 8 TB/s.
NVIDIA = (
    Chip("A100 40GB", 1555, 40, _AMPERE, 312, _AMPERE),
    Chip("A100 80GB", 2039, 80, _A100, 312, _A100),
    Chip("H100", 3350, 80, _H100, 989, _H100),
    Chip("H200", 4800, 141, _H200, 989, _H200),
    Chip("L4", 300, 24, _L4, 121, _L4),
    Chip("L40S", 864, 48, _L40S, 362, _L40S),
    Chip("RTX 3090", 936, 24, _GA102, 71, _GA102),
    Chip("RTX 4090", 1008, 24, _ADA, 165.2, _ADA),
    Chip("RTX 5090", 1792, 32, _BLACKWELL, 209.5, _BLACKWELL),
    Chip("DGX Spark", 273, 128, _SPARK),
)

CHIPS = (*APPLE, *NVIDIA)


def chips_named(names: Iterable[str]) -> tuple[Chip, ...]:
    """Chips by names such as ``m1-pro`` or ``RTX 4090``; ``all`` for all.

    Raises:
        ParameterError: no chip of that name.
    """
    by_key = {chip.key: chip for chip in CHIPS}
    chosen: dict[str, Chip] = {}
    for name in names:
        key = _key(name).removeprefix("apple-").removeprefix("nvidia-")
        if key == ALL:
            return CHIPS
        if key not in by_key:
            near = get_close_matches(key, by_key, n=3) or list(by_key)[:3]
            raise ParameterError("chip", name, f"all, or one such as {', '.join(near)}")
        chosen[key] = by_key[key]
    return tuple(chosen.values())
