"""A model's memory on this machine, estimated before the download."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_hub import FakeHub

from converters.gguf.reader import read_gguf
from converters.quantize.encode import expected_layout
from converters.quantize.policy import Policy
from mlxrun.errors import HubError
from mlxrun.hub import download, pull
from mlxrun.hub.names import Choice, HubFile, HubName, choose, gguf_models
from mlxrun.kernels import device
from mlxrun.kernels.device import CPU, GPU
from mlxrun.memory import device as memory

GB = 10**9
BODY = bytes(range(256)) * 200
QUANTS = ("Q2_K", "Q3_K_S", "Q4_K_M", "Q5_K_S", "Q6_K", "Q8_0", "F16", "IQ2_XS", "IQ3_XS", "IQ4_XS",
          "Q4_0", "TQ2_0", "BF16", "MXFP4_MOE")  # fmt: skip


def model(label: str, size: float) -> Choice:
    path = f"m-{label}.gguf" if label else ""
    return Choice((HubFile(path or "model.safetensors", int(size * GB)),), path)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU and 16 GB for models."""
    monkeypatch.setattr(download, "machine_memory", lambda: 16 * GB)
    monkeypatch.setattr(download, "device", lambda: GPU)


@pytest.mark.parametrize("label", QUANTS)
def test_the_name_gives_about_the_size_of_the_tensors(
    oracle: Path, monkeypatch: pytest.MonkeyPatch, label: str
) -> None:
    """Compared with each tensor's own type, in files of llama-quantize."""
    monkeypatch.setattr(download, "device", lambda: GPU)
    tensors = read_gguf(oracle / "quants" / f"{label}.gguf").tensors
    policy = Policy("near", "float16")
    expected_bytes = 0.0
    for tensor in tensors:
        expected = expected_layout(tensor.type, policy, module=len(tensor.shape) > 1)
        assert expected is not None
        expected_bytes += tensor.elements * expected.layout.bits_per_weight / 8
    estimate = download.needed(model(label, sum(tensor.nbytes for tensor in tensors) / GB))
    assert 0.9 * expected_bytes < estimate < 1.4 * expected_bytes


def test_models_stay_as_they_are_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "device", lambda: CPU)
    assert download.needed(model("Q6_K", 0.1)) == pytest.approx(1.1 * 0.1 * GB, rel=0.01)


@pytest.mark.usefixtures("machine")
def test_the_announcement_says_size_need_and_room() -> None:
    name = HubName("org/repo")
    text = download.announcement(name, model("Q8_0", 4), missing=4 * GB)
    need = 1.1 * 4 * 9 / 8.5
    assert text == (
        f"downloading Q8_0 of org/repo, 4.0 GB; it runs in about {need:.1f} GB of the 16.0 GB that "
        "this machine has for models"
    )
    assert "4.0 GB, 1.0 GB of it here already; " in download.announcement(
        name, model("Q8_0", 4), missing=3 * GB
    )
    assert download.announcement(name, model("", 4), missing=4 * GB).startswith(
        "downloading org/repo, 4.0 GB; "
    )


@pytest.mark.usefixtures("machine")
def test_a_model_that_is_too_large_names_the_largest_that_is_not() -> None:
    small, fitting, large = model("Q4_0", 5), model("Q5_0", 10), model("Q8_0", 15.9)
    assert download.warning(fitting, [small, fitting, large]) is None
    text = download.warning(large, [small, fitting, large])
    assert text is not None and text.startswith("warning: Q8_0 does not fit")
    assert text.endswith("is Q5_0 (10.0 GB)")
    alone = download.warning(large, [large])
    assert alone is not None and alone.endswith("look for a smaller quantization or model")


def test_nothing_is_too_large_if_the_memory_is_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(download, "machine_memory", lambda: 0)
    assert download.fits(model("F16", 10_000))
    assert "machine" not in download.announcement(HubName("a/b"), model("Q8_0", 4), missing=4 * GB)


@pytest.mark.usefixtures("machine")
def test_lists_mark_models_that_are_too_large() -> None:
    files = [HubFile("m-Q5_0.gguf", 10 * GB), HubFile("m-Q8_0.gguf", 16 * GB)]
    marked = r"Q5_0 \(10\.0 GB\); Q8_0 \(16\.0 GB, too large for this machine\)"
    with pytest.raises(HubError, match=marked):
        choose(HubName("a/b"), files, download.fits)
    with pytest.raises(HubError, match=r"m-Q8_0\.gguf \(16\.0 GB, too large for this machine\)$"):
        choose(HubName("a/b", file="x.gguf"), files, download.fits)
    assert [choice.label for choice in gguf_models(files)] == ["Q5_0", "Q8_0"]


def test_the_announcement_comes_before_the_first_byte_and_not_for_cached_models(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "machine_memory", lambda: 50_000)
    monkeypatch.setattr(download, "device", lambda: CPU)
    hub.add("org/repo", {"m-Q4_K_M.gguf": BODY, "m-Q2_K.gguf": BODY[:9000]})
    events: list[str] = []
    pull("org/repo", notify=events.append, progress=lambda done, total: events.append("bytes"))
    assert [event.partition(" ")[0] for event in events[:3]] == ["downloading", "warning:", "bytes"]
    assert "Q4_K_M of org/repo, 0.1 MB" in events[0] and "is Q2_K (0.0 MB)" in events[1]
    assert set(events[2:]) == {"bytes"}
    events.clear()
    pull("org/repo", notify=events.append)
    assert events == []


def test_a_container_may_have_less_than_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "_CONTAINER", (str(tmp_path / "none"), str(limit)))
    monkeypatch.setattr(memory, "working_set", lambda: 0)
    limit.write_text("max\n")
    physical = memory.machine_memory()
    assert physical > 0
    limit.write_text(f"{physical // 2}\n")
    assert memory.machine_memory() == physical // 2


def test_metal_gives_the_working_set(monkeypatch: pytest.MonkeyPatch) -> None:
    import mlx.core as mx

    monkeypatch.setattr(device, "device", lambda: GPU)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 12345})
    assert memory.machine_memory() == 12345
    monkeypatch.setattr(mx, "device_info", dict)
    assert memory.machine_memory() > 12345
