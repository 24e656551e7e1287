"""The roofline: how fast a device could do some work at most, and which of its limits binds.

Williams, Waterman and Patterson, 2009, doi:10.1145/1498765.1498785: work takes at least as long as
its bytes at the device's bandwidth, and as long as its operations at the device's throughput.
Arithmetic only.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlxrun.planning.work import Work

BANDWIDTH, COMPUTE = "bandwidth", "compute"


@dataclass(frozen=True)
class Roof:
    """What a device can do at most.

    Attributes:
        bandwidth: bytes a second between memory and processor.
        throughput: FLOPs a second in products of matrices; None where there is no figure.
    """

    bandwidth: float
    throughput: float | None


@dataclass(frozen=True)
class Limit:
    """How fast some work can be done at most; a bound, never a measurement.

    Attributes:
        rate: tokens a second over all sequences.
        seconds: the least that the work takes.
        binds: ``bandwidth`` or ``compute``.
        whole: whether both were compared; else bandwidth alone was known.
    """

    rate: float
    seconds: float
    binds: str
    whole: bool


def limit(work: Work, roof: Roof) -> Limit:
    """The limit of some work on a device.

    Where operations or throughput are not known it is that of bandwidth alone, which a device may
    miss by far when it reads a prompt.
    """
    moving, computing = work.nbytes / roof.bandwidth, None
    if work.operations is not None and roof.throughput is not None:
        computing = work.operations / roof.throughput
    seconds = max(moving, computing or 0.0)
    binds = BANDWIDTH if moving == seconds else COMPUTE
    return Limit(work.tokens / seconds, seconds, binds, computing is not None)
