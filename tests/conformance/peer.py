"""A first draft of a skeleton from a listing of an architecture's keys and tensors.

The listing is that of llama.cpp's own architecture test: every key with some value and every
optional tensor. A draft is to be cut down to what real files of the architecture have.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

# Entries of the listings for every architecture, needed or not.
_NOISE = re.compile(
    r"general\..*|vocab_size|pooling_type|decoder_start_token_id|token_shift_count|.*situ_beta"
    r"|expert_group_scale|swiglu_clamp.*|attn_logit_softcapping|(router|final)_logit_softcapping"
    r"|attention\.(causal|rope_pattern|indexer\.kpool_select_tail|(key|value)_length_swa)"
    r"|rope\.(dimension_count_swa|dimension_sections|freq_base_swa|scaling\..*)|kda\..*"
)
_KINDS = {"INT32": "i32", "UINT64": "u64", "INT64": "i64"}


def draft(path: Path) -> str:
    """The text of a skeleton for a listing."""
    listing = json.loads(path.read_text())
    arch = listing["arch"]
    keys = {
        key.removeprefix(f"{arch}."): _value(*typed)
        for key, typed in listing["kv"].items()
        if not _NOISE.fullmatch(key.removeprefix(f"{arch}."))
    }
    return dump({"arch": arch, "keys": keys, "tensors": _patterns(listing["tensors"], keys)})


def dump(skeleton: dict[str, Any]) -> str:
    """JSON with a line for each key and each tensor."""
    parts = []
    for name, value in skeleton.items():
        if isinstance(value, dict):
            lines = [f"    {_json(k)}: {_json(v)}" for k, v in value.items()]
            parts.append(f"  {_json(name)}: {{\n" + ",\n".join(lines) + "\n  }")
        else:
            parts.append(f"  {_json(name)}: {_json(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _value(kind: str, item: str | None, value: Any) -> Any:
    if "FLOAT32" in (kind, item):
        value = np.array(value, np.float32).tolist()
        tidy = [float(str(np.float32(x))) for x in (value if item else [value])]
        return tidy if item else tidy[0]
    short = _KINDS.get(item or kind)
    return {short: value} if short else value


def _patterns(tensors: dict[str, Any], keys: dict[str, Any]) -> dict[str, list[Any]]:
    """Tensors of the same name and shape in several layers become one pattern."""
    layers: dict[tuple[str, str], list[int]] = {}
    for name, stored in tensors.items():
        match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
        key = (match[2] if match else name, json.dumps(stored))
        layers.setdefault(key, []).extend([int(match[1])] if match else [])
    patterns = {}
    for (name, stored), found in layers.items():
        shape, kind = json.loads(stored)
        everywhere = found == list(range(keys["block_count"]))
        where = "*" if everywhere else ",".join(map(str, found))
        patterns[f"blk.{where}.{name}" if found else name] = (
            shape if kind == "F32" else [kind, *shape]
        )
    return patterns
