"""Downloads from a hub on loopback: complete, resumed, verified, refused."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
from fake_hub import FakeHub, sha256
from huggingface_hub import constants
from patience import PATIENCE

from mlxrun.errors import HubError
from mlxrun.hub import download, pull, resolve

BODY = bytes(range(256)) * 200  # 51,200 bytes: more than a few chunks


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long it waited between tries, without waiting."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


def parts_of(hub_cache: str) -> list[Path]:
    return sorted(Path(hub_cache).rglob("*.incomplete"))


def test_a_single_gguf_is_fetched_and_comes_back_from_the_cache(hub: FakeHub) -> None:
    hub.add("org/repo", {"README.md": b"hello", "model.gguf": BODY})
    path = resolve("org/repo")
    assert path.name == "model.gguf" and path.read_bytes() == BODY
    assert len(hub.blobs()) == 1
    hub.seen.clear()
    assert resolve("org/repo") == path
    (asked,) = hub.seen
    assert asked.path.startswith("/api/models/org/repo/revision/main?")


def test_progress_counts_bytes_up_to_the_whole(hub: FakeHub) -> None:
    hub.add("org/repo", {f"m-0000{i}-of-00002.gguf": BODY + bytes([i]) for i in (1, 2)})
    calls: list[tuple[int, int]] = []
    pull("org/repo", progress=lambda done, total: calls.append((done, total)))
    total = 2 * len(BODY) + 2
    assert calls[0] == (0, total) and calls[-1] == (total, total)
    assert len(calls) > 10
    assert all(a <= b for (a, _), (b, _) in pairwise(calls))
    assert {whole for _, whole in calls} == {total}


def test_shards_in_a_folder_are_fetched_together_and_the_first_is_returned(hub: FakeHub) -> None:
    shards = {f"Q8_0/m-Q8_0-0000{i}-of-00003.gguf": BODY + bytes([i]) for i in (3, 1, 2)}
    hub.add("org/repo", {**shards, "Q4_0/m-Q4_0.gguf": b"small"})
    path = resolve("org/repo:q8_0")
    assert path.name == "m-Q8_0-00001-of-00003.gguf"
    assert {each.name: each.read_bytes() for each in path.parent.iterdir()} == {
        Path(name).name: content for name, content in shards.items()
    }


def test_a_repository_without_gguf_gives_a_directory_of_the_model(hub: FakeHub) -> None:
    model = {
        "config.json": b"{}",
        "tokenizer.json": b"{ }",
        "tokenizer_config.json": b"{  }",
        "chat_template.jinja": b"{{ x }}",
        "generation_config.json": b"{   }",
        "model.safetensors.index.json": b"{    }",
        "model-00001-of-00002.safetensors": BODY,
        "model-00002-of-00002.safetensors": BODY + b"2",
    }
    others = {
        "pytorch_model.bin": b"1",
        "consolidated.safetensors": b"2",
        "original/model.safetensors": b"3",
        "onnx/model.onnx": b"4",
        "modeling_evil.py": b"5",
    }
    hub.add("org/repo", model | others)
    path = resolve("org/repo")
    assert {each.name: each.read_bytes() for each in path.iterdir()} == model


def test_a_dropped_connection_is_resumed_where_it_broke(hub: FakeHub) -> None:
    hub.add("org/repo", {"model.gguf": BODY})
    hub.switches.drops = [20_000]
    assert resolve("org/repo").read_bytes() == BODY
    first, second = hub.blobs()
    assert first.range is None
    assert second.range is not None and 0 < int(second.range[6:-1]) <= 20_000


def test_a_reset_connection_is_resumed_too(hub: FakeHub) -> None:
    hub.add("org/repo", {"model.gguf": BODY})
    hub.switches.drops, hub.switches.reset = [30_000], True
    assert resolve("org/repo").read_bytes() == BODY


def test_an_interrupt_leaves_a_part_that_the_next_run_completes(hub: FakeHub) -> None:
    hub.add("org/repo", {"model.gguf": BODY})

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull("org/repo", progress=interrupt)
    (part,) = parts_of(constants.HF_HUB_CACHE)
    kept = part.stat().st_size
    assert kept > len(BODY) // 2
    calls: list[int] = []
    path = pull("org/repo", progress=lambda done, total: calls.append(done))
    assert path.read_bytes() == BODY
    assert hub.blobs()[-1].range == f"bytes={kept}-"
    assert parts_of(constants.HF_HUB_CACHE) == []
    assert calls[1] > kept


def test_a_server_that_ignores_ranges_sends_all_again(hub: FakeHub) -> None:
    hub.add("org/repo", {"model.gguf": BODY})
    blobs = Path(constants.HF_HUB_CACHE, "models--org--repo", "blobs")
    blobs.mkdir(parents=True)
    (blobs / f"{sha256(BODY)}.incomplete").write_bytes(BODY[:9000])
    hub.switches.ignore_range = True
    assert resolve("org/repo").read_bytes() == BODY


@pytest.mark.parametrize("junk", [b"not this file", BODY + b"longer", b"x" * len(BODY)])
def test_a_part_that_is_no_prefix_is_fetched_anew(hub: FakeHub, junk: bytes) -> None:
    hub.add("org/repo", {"model.gguf": BODY})
    blobs = Path(constants.HF_HUB_CACHE, "models--org--repo", "blobs")
    blobs.mkdir(parents=True)
    (blobs / f"{sha256(BODY)}.incomplete").write_bytes(junk)
    assert resolve("org/repo").read_bytes() == BODY


@pytest.mark.parametrize("kept", [0, 1000])
def test_a_file_that_was_cut_short_is_completed(hub: FakeHub, kept: int) -> None:
    hub.add("org/repo", {"model.gguf": BODY})
    path = resolve("org/repo")
    os.truncate(path, kept)
    assert resolve("org/repo").read_bytes() == BODY


def test_a_wrong_hash_is_an_error_and_nothing_stays(hub: FakeHub) -> None:
    hub.add("org/repo", {"model.gguf": BODY})
    hub.switches.corrupt = True
    with pytest.raises(HubError, match=r"model\.gguf of org/repo arrived damaged"):
        resolve("org/repo")
    left = [path for path in Path(constants.HF_HUB_CACHE).rglob("*") if path.is_file()]
    assert not [path for path in left if path.stat().st_size >= len(BODY)]
    hub.switches.corrupt = False
    assert resolve("org/repo").read_bytes() == BODY


def test_the_token_goes_to_the_hub_and_not_to_the_host_of_blobs(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/repo", {"model.gguf": BODY}, private=True, gated=True)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert resolve("org/repo").read_bytes() == BODY
    assert {seen.authorization for seen in hub.blobs()} == {None}


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: FakeHub) -> None:
    hub.add("org/repo", {"model.gguf": BODY}, revisions=("main", "refs/pr/1"))
    assert resolve("org/repo@refs/pr/1") == resolve(f"org/repo@{'c' * 40}") == resolve("org/repo")
    refs = Path(constants.HF_HUB_CACHE, "models--org--repo", "refs")
    names = {path.relative_to(refs).as_posix() for path in refs.rglob("*") if path.is_file()}
    assert names == {"main", "refs/pr/1"}


def test_a_new_commit_is_seen_and_unchanged_files_are_kept(hub: FakeHub) -> None:
    repo = hub.add("org/repo", {"a-Q4_K_M.gguf": BODY, "a-Q8_0.gguf": BODY + b"8"})
    resolve("org/repo")
    repo.commit = "d" * 40
    assert "d" * 40 in str(resolve("org/repo"))
    assert len(hub.blobs()) == 1


def test_the_cache_serves_an_unreachable_hub_and_names_missing_files(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/repo", {"a-Q4_K_M.gguf": BODY, "a-Q8_0.gguf": BODY + b"8"})
    path = resolve("org/repo:Q4_K_M")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert resolve("org/repo:Q4_K_M") == resolve("org/repo") == path
    with pytest.raises(HubError, match=r"127\.0\.0\.1:1.*in the cache, org/repo has no Q8_0 model"):
        resolve("org/repo:Q8_0")
    with pytest.raises(HubError, match="org/other could not be fetched"):
        resolve("org/other")


def test_an_interrupted_model_is_not_taken_for_a_complete_one(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/repo", {f"m-0000{i}-of-00002.gguf": BODY + bytes([i]) for i in (1, 2)})

    def interrupt(done: int, total: int) -> None:
        if done > len(BODY) + 5000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull("org/repo", progress=interrupt)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(HubError):
        resolve("org/repo")


def test_paths_that_leave_the_repository_are_ignored(hub: FakeHub) -> None:
    hub.add("org/repo", {"../../evil.gguf": BODY, "/abs.gguf": BODY, "model.gguf": BODY + b"1"})
    assert resolve("org/repo").name == "model.gguf"


def test_nothing_is_printed(hub: FakeHub, capfd: pytest.CaptureFixture[str]) -> None:
    hub.add("org/repo", {"config.json": b"{}", "model.safetensors": BODY})
    resolve("org/repo")
    assert capfd.readouterr() == ("", "")


def test_a_mirror_with_etags_of_its_own_is_checked_too(hub: FakeHub) -> None:
    hub.add("org/repo", {"model.gguf": BODY})
    hub.switches.odd_etags = True
    path = resolve("org/repo")
    assert path.read_bytes() == BODY and path.resolve().name != sha256(BODY)


def test_downloads_of_huggingface_hub_itself_are_verified_too(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/repo", {"model.gguf": BODY})
    monkeypatch.setattr(download, "_LARGEST", 1000)
    hub.switches.corrupt = True
    with pytest.raises(HubError, match="damaged"):
        resolve("org/repo")
    hub.switches.corrupt = False
    assert resolve("org/repo").read_bytes() == BODY


def test_two_at_once_fetch_once(hub: FakeHub) -> None:
    hub.add("org/repo", {"model.gguf": BODY})
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(resolve, ["org/repo"] * 2)
    assert first == second and first.read_bytes() == BODY
    assert len(hub.blobs()) == 1


def test_two_processes_fetch_once(hub: FakeHub) -> None:
    hub.add("org/repo", {"model.gguf": BODY * 200})
    code = "from mlxrun.hub import pull; print(pull('org/repo').stat().st_size)"
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": constants.HF_HUB_CACHE}
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    assert [each.communicate(timeout=PATIENCE)[0] for each in both] == [
        b"%d\n" % len(BODY * 200)
    ] * 2
    assert len(hub.blobs()) == 1


@pytest.mark.parametrize(("status", "after"), [(429, "1"), (503, "2"), (502, ""), (504, "Fri")])
def test_a_busy_hub_is_asked_again_when_it_says(
    hub: FakeHub, pauses: list[float], status: int, after: str
) -> None:
    hub.add("org/repo", {"model.gguf": BODY})
    hub.switches.busy = [(status, after)]
    assert resolve("org/repo").read_bytes() == BODY
    assert pauses == [float(after) if after.isdigit() else 1]


def test_a_hub_that_gets_busy_over_a_file_is_asked_again(hub: FakeHub, pauses: list[float]) -> None:
    hub.add("org/repo", {"model.gguf": BODY})

    def busy(line: str) -> None:
        hub.switches.busy = [(503, "3"), (503, "")]

    assert pull("org/repo", notify=busy).read_bytes() == BODY
    assert pauses == [3, 2]


@pytest.mark.parametrize("after", ["", "3600"])
def test_a_hub_that_stays_busy_is_an_error(hub: FakeHub, pauses: list[float], after: str) -> None:
    hub.add("org/repo", {"model.gguf": BODY})
    hub.switches.busy = [(503, after)] * 20
    with pytest.raises(HubError, match="status 503"):
        resolve("org/repo")
    assert sum(pauses) < 10


def test_a_hub_that_fails_after_the_last_byte_is_no_missing_file(
    hub: FakeHub, pauses: list[float]
) -> None:
    hub.add("org/repo", {"model.gguf": BODY})

    def fail_at_the_end(done: int, total: int) -> None:
        if done == total and not hub.switches.busy:
            hub.switches.busy = [(503, "")] * 20

    with pytest.raises(HubError, match="status 503"):
        pull("org/repo", progress=fail_at_the_end)
    hub.switches.busy.clear()
    assert pull("org/repo").read_bytes() == BODY
    assert len(hub.blobs()) == 1


def test_a_renamed_repository_is_found_under_its_old_name(hub: FakeHub) -> None:
    hub.add("org/new", {"model.gguf": BODY, "README.md": b"hello"})
    hub.switches.renamed = {"org/old": "org/new"}
    assert resolve("org/old").read_bytes() == BODY


def test_a_file_that_the_hub_offers_over_xet_comes_over_http(hub: FakeHub) -> None:
    hub.add("org/repo", {"model.gguf": BODY})
    hub.switches.xet = True
    assert resolve("org/repo").read_bytes() == BODY
    assert len(hub.blobs()) == 1
    assert not [seen for seen in hub.seen if "xet" in seen.path]


def test_companions_of_models_are_not_fetched(hub: FakeHub) -> None:
    shards = {f"model-0000{i}-of-00002.safetensors": BODY + bytes([i]) for i in (1, 2)}
    index = {"config.json": b"{}", "model.safetensors.index.json": b"{    }"}
    others = {"model.fp16.safetensors": b"1", "pytorch_model.bin": b"2", "x.pth": b"3"}
    hub.add("org/repo", shards | index | others)
    assert {each.name for each in resolve("org/repo").iterdir()} == {*shards, *index}
