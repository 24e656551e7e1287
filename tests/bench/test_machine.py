"""Facts of the machine."""

from __future__ import annotations

import json

from mlxrun.bench.machine import machine
from mlxrun.memory.device import cores


def test_facts_are_json_and_name_what_matters():
    found = json.loads(json.dumps(machine(["mlxrun", "mlx", "no-such-package"])))
    assert found["device"] and found["processor"] and found["system"]
    assert found["cores"] == cores() >= 1
    assert found["versions"]["no-such-package"] == "unknown"
    assert {"python", "mlx"} <= set(found["versions"])
