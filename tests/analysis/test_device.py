"""Rates of a device are bytes and FLOPs over seconds."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlxrun.analysis import device
from mlxrun.analysis.device import Device, Rate, measure_device


def test_a_device_moves_and_multiplies() -> None:
    found = measure_device(nbytes=1 << 20, side=64)
    assert found.moved == 1 << 20
    rates = (*found.bandwidth, *found.throughput)
    assert all(0 < rate.median <= rate.best < math.inf for rate in rates)
    if mx.default_device() == mx.cpu:
        assert [rate.name for rate in found.throughput] == ["float32"]
        assert found.cached == device.last_cache()


def test_rates_are_amounts_by_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count(step=0.5)  # seconds
    monkeypatch.setattr(device, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    found = measure_device(nbytes=1 << 20, side=32)
    by_name = {rate.name: rate for rate in (*found.bandwidth, *found.throughput)}
    assert by_name["copy, MLX"].best == by_name["copy, MLX"].median == 2 * (2 << 20)
    assert by_name["read, MLX"].best == 2 * (1 << 20)
    if "copy, all cores" in by_name:
        assert by_name["copy, all cores"].best == 2 * (2 << 20)
        assert by_name["float32"].best == 2 * (2 * 32**3)


def test_products_of_a_gpu_run_in_every_type() -> None:
    products = device._products(64)
    names = [rate.name for rate in products]
    assert names == ["float16", "bfloat16", "float16 x 4 bits", "float32"]
    assert all(rate.best > 0 for rate in products)


DEVICE = Device(
    1000,
    10,
    (Rate("copy", 50.0, 40.0), Rate("read", 90.0, 20.0)),
    (Rate("float16", 7.0, 6.0), Rate("float16 x 4 bits", 8.0, 6.0), Rate("float32", 3.0, 2.0)),
)


@pytest.mark.parametrize(("dtype", "most"), [("float32", 3.0), ("float16", 8.0), ("bfloat16", 8.0)])
def test_the_best_is_the_limit(dtype: str, most: float) -> None:
    roof = DEVICE.roof(dtype)
    assert (roof.bandwidth, roof.throughput) == (90.0, most)


def test_arrays_are_larger_than_caches_and_leave_memory_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device, "room", lambda: 0)  # the system does not say
    assert device._bytes_to_move(own_memory=False, cached=1 << 30) == 4 << 30
    assert device._bytes_to_move(own_memory=True, cached=0) == device.GPU_BYTES
    monkeypatch.setattr(device, "room", lambda: 1 << 20)
    assert device._bytes_to_move(own_memory=False, cached=0) == 1 << 17
