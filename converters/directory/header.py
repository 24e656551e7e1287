"""What a safetensors file says it holds, read from its header and checked against its size.

Format: https://github.com/huggingface/safetensors. Reads headers only, and not more of one than its
file holds; never looks at a weight.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError, shortened

# The format's own limit on a header.
_LONGEST_HEADER = 100_000_000
# Types that MLX reads, and the bits of an element.
DTYPES = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
}


@dataclass(frozen=True)
class StoredArray:
    """One entry of a header.

    Attributes:
        dtype: in the format's terms, such as ``BF16``.
        shape: of the array.
        nbytes: of its data.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def read_header(path: Path) -> dict[str, StoredArray]:
    """The arrays of a file by name.

    Raises:
        CheckpointError: the file is cut short, damaged or no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(_LONGEST_HEADER, size):
                raise CheckpointError(
                    f"cannot read {path}: its header claims {length} bytes of {size}",
                    hint="It is damaged or no safetensors file: download it again",
                )
            header = json.loads(file.read(length))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path.name}: its header is not a JSON object")
    header.pop("__metadata__", None)
    return {name: _entry(path, name, entry, size - 8 - length) for name, entry in header.items()}


def _entry(path: Path, name: str, entry: Any, room: int) -> StoredArray:
    where = f"{path.name}: {shortened(name, 200)}"
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
        begin, end = (int(n) for n in entry["data_offsets"])
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{where} has a damaged header: {error!r}") from error
    if min(begin, *shape, 0) < 0 or end < begin:
        raise CheckpointError(f"{where} has a damaged header: shape {shape}, bytes {begin}-{end}")
    if end > room:
        raise CheckpointError(
            f"{where} ends at byte {end} of the data, the file has {max(room, 0)}",
            hint="The file is cut short, as a download that stopped is: fetch it again",
        )
    bits = DTYPES.get(dtype)
    if bits is not None and prod(shape) * bits != 8 * (end - begin):
        raise CheckpointError(
            f"{where} has {end - begin} bytes, {shape} of {dtype} need {prod(shape) * bits // 8}"
        )
    return StoredArray(dtype, shape, end - begin)
