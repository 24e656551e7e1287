"""Refusals, gaps and garbage of a hub, and failures of the disk: one line each."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
from fake_hub import FakeHub
from huggingface_hub import constants

from mlxrun.errors import HubError, OutOfSpaceError
from mlxrun.hub import pull, resolve

BODY = bytes(range(256)) * 200


def test_a_disk_without_space_is_an_error_before_any_download(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/repo", {"model.gguf": BODY})
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutOfSpaceError, match=r"org/repo needs 0\.1 MB .* has 0\.0 MB free"):
        resolve("org/repo")
    assert hub.blobs() == []


def test_a_full_disk_in_the_middle_is_an_error_and_keeps_the_part(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/repo", {"model.gguf": BODY})

    def full(done: int, total: int) -> None:
        if done > total // 2:
            raise OSError(28, "No space left on device")

    with pytest.raises(OutOfSpaceError, match="full"):
        pull("org/repo", progress=full)
    assert len(list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))) == 1


def test_a_gated_model_says_where_to_accept_and_how_to_log_in(hub: FakeHub) -> None:
    hub.add("org/repo", {"model.gguf": BODY}, gated=True)
    with pytest.raises(HubError, match="org/repo is gated") as caught:
        resolve("org/repo")
    assert f"{hub.url}/org/repo" in str(caught.value) and "HF_TOKEN" in str(caught.value)


def test_a_gated_model_whose_license_is_not_accepted_says_so_too(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/repo", {"model.gguf": BODY}, gated=True, accepted=False)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    with pytest.raises(HubError, match=r"org/repo is gated\. Accept its license"):
        resolve("org/repo")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("org/other", "the hub has no model org/other, or it is private"),
        ("org/secret", "the hub has no model org/secret, or it is private"),
        ("org/repo@v9", "org/repo has no revision v9"),
        ("org/repo/nope.gguf", r"org/repo has no file nope\.gguf\. It has model\.gguf \(0\.1 MB\)"),
        ("org/repo:Q5_0", r"org/repo has no Q5_0 model: model\.gguf"),
    ],
)
def test_missing_things_are_named(hub: FakeHub, source: str, message: str) -> None:
    hub.add("org/repo", {"model.gguf": BODY})
    hub.add("org/secret", {"model.gguf": BODY}, private=True)
    with pytest.raises(HubError, match=message) as caught:
        resolve(source)
    assert "\n" not in str(caught.value)


def info(size: object) -> bytes:
    files = [{"rfilename": "model.gguf", "size": size}]
    return json.dumps({"id": "org/repo", "sha": "0" * 40, "siblings": files}).encode()


@pytest.mark.parametrize(
    ("status", "page", "message"),
    [
        (500, b"", "status 500"),
        (429, b"", "rate"),
        (403, b"", "refuses access"),
        (404, b"", "has no org/repo"),
        (0, b"<html>log in</html>", "does not answer as a hub"),
        (0, b"[]", "does not answer as a hub"),
        (0, b'{"id": "org/repo", "sha": "../..", "siblings": []}', "does not answer as a hub"),
        (0, info(10**400), "hub: ValueError: 10+ is no size"),
        (0, info("large"), "hub: ValueError: large is no size"),
        (0, info(-1), "hub: ValueError: -1 is no size"),
        (0, b"[" * 200_000, "does not answer as a hub"),
    ],
)
def test_a_hub_in_trouble_is_one_line(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, status: int, page: bytes, message: str
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.switches.status, hub.switches.page = status, page
    with pytest.raises(HubError, match=message) as caught:
        resolve("org/repo")
    assert "\n" not in str(caught.value)


def test_a_file_that_vanishes_after_it_was_listed_is_named(hub: FakeHub) -> None:
    repo = hub.add("org/repo", {"model.gguf": BODY})
    with pytest.raises(HubError, match=r"org/repo has no file model\.gguf"):
        pull("org/repo", progress=lambda done, total: repo.files.clear())


def test_a_cache_that_cannot_be_written_is_named(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("org/repo", {"model.gguf": BODY})
    Path(constants.HF_HUB_CACHE).write_bytes(b"a file where a directory should be")
    with pytest.raises(HubError, match=r"cache .* cannot be written.*HF_HOME"):
        resolve("org/repo")
