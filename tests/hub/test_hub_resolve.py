"""Paths and hub names; and huggingface_hub's own settings, end to end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import FakeHub
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from patience import PATIENCE

from converters.staging import set_aside
from mlxrun.errors import HubError, SourceError
from mlxrun.hub import pull, resolve

BODY = b"GGUF" + bytes(5000)


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty working directory, and a hub that must not be asked."""

    def asked(name: str, **_: object) -> Path:
        raise AssertionError(f"the hub was asked for {name}")

    monkeypatch.setattr(sys.modules[resolve.__module__], "pull", asked)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_existing_path_wins_over_a_name(never: Path) -> None:
    (never / "org" / "repo").mkdir(parents=True)
    (never / "m.gguf").write_bytes(BODY)
    assert resolve("org/repo") == Path("org/repo")
    assert resolve("m.gguf") == Path("m.gguf")
    assert resolve(never / "m.gguf") == never / "m.gguf"


def test_a_tilde_after_a_dot_is_a_letter(never: Path) -> None:
    (never / "~m.gguf").write_bytes(BODY)
    assert resolve("./~m.gguf").read_bytes() == BODY


def test_a_link_to_itself_is_not_suggested(never: Path) -> None:
    (never / "loop.gguf").symlink_to("loop.gguf")
    with pytest.raises(SourceError) as caught:
        resolve("loop.gguf")
    assert "Did you mean" not in str(caught.value)


def test_a_home_directory_is_expanded(never: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(never))
    (never / "m.gguf").write_bytes(BODY)
    assert resolve("~/m.gguf") == never / "m.gguf"


@pytest.mark.parametrize(
    "text",
    ["", "m", "m.gguf", "dir/m.gguf", "./org/repo", "../repo", "/org/repo", "~/x", "~nobody-/x",
     "a/b/c", "a/b/c/d", "here/deep/m.gguf", "nul\0", "x" * 5000, "/" + "x" * 300, ".."  "/nope"],
)  # fmt: skip
def test_what_looks_like_a_path_is_never_asked_of_the_hub(never: Path, text: str) -> None:
    (never / "here" / "deep").mkdir(parents=True)
    with pytest.raises(SourceError) as caught:
        resolve(text)
    assert not isinstance(caught.value, HubError)
    assert caught.value.hint and "\n" not in str(caught.value)


def test_a_path_object_is_never_asked_of_the_hub(never: Path) -> None:
    with pytest.raises(SourceError, match="there is no model at org/repo"):
        resolve(Path("org/repo"))


def test_a_folder_without_a_similar_name_is_named(never: Path) -> None:
    with pytest.raises(SourceError, match="No name in the directory / is similar; a model on"):
        resolve("/no-such-model-anywhere")


@pytest.mark.parametrize("text", ["tinylama.gguf", "./tinyllama.GGUF", "TinyLlama"])
def test_the_nearest_name_is_suggested(never: Path, text: str) -> None:
    (never / "tinyllama.gguf").write_bytes(BODY)
    (never / "tinyllama.txt").write_bytes(BODY)
    with pytest.raises(SourceError, match=r"Did you mean tinyllama\.gguf\?"):
        resolve(text)


@pytest.mark.parametrize("name", ["pub", "some/pub"])
def test_a_model_that_was_set_aside_says_how_to_get_it_back(never: Path, name: str) -> None:
    """A conversion that replaced it was killed, where names cannot be exchanged."""
    old = set_aside(Path(name))
    old.mkdir(parents=True)
    with pytest.raises(SourceError, match=rf"replacing it has been killed.* mv {old} {name}$"):
        resolve(name)
    old.rename(name)
    assert resolve(name) == Path(name)


def test_a_name_that_could_be_a_path_suggests_that_too(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "models" / "tinyllama").mkdir(parents=True)
    with pytest.raises(HubError, match=r"no model models/tinylama.*local models/tinyllama"):
        resolve("models/tinylama")


def test_pull_takes_hub_names_only(never: Path) -> None:
    (never / "m.gguf").write_bytes(BODY)
    with pytest.raises(SourceError, match="is not a model"):
        pull("m.gguf")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.sampled_from("ab/Q4_0:@.~- \0\n") | st.characters(), max_size=20))
@example("https://hf.co/a/b")
@example("a/b/c.gguf")
def test_any_text_is_a_path_a_fetch_or_an_error(never: Path, text: str) -> None:
    try:
        assert resolve(text).exists()
    except SourceError as error:
        assert not isinstance(error, HubError)
        assert "\n" not in str(error)
    except AssertionError as asked:
        assert "the hub was asked" in str(asked)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own: huggingface_hub reads its environment once."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


FETCH = "import sys; from mlxrun.hub import resolve; print(resolve('org/repo:Q4_0'))"


def test_a_mirror_a_home_and_offline_come_from_the_environment(
    hub: FakeHub, tmp_path: Path
) -> None:
    hub.add("org/repo", {"m-Q4_0.gguf": BODY, "m-Q8_0.gguf": BODY})
    home = str(tmp_path / "home")
    online = run(FETCH, HF_ENDPOINT=hub.url, HF_HOME=home)
    assert online.returncode == 0, online.stderr
    path = Path(online.stdout.strip())
    assert path.is_relative_to(home) and path.read_bytes() == BODY
    asked = {seen.path.partition("?")[0] for seen in hub.seen} - {hub.blobs()[0].path}
    commit = "c" * 40
    assert asked == {
        "/api/models/org/repo/revision/main",
        f"/org/repo/resolve/{commit}/m-Q4_0.gguf",
    }
    hub.seen.clear()
    offline = run(FETCH, HF_ENDPOINT=hub.url, HF_HOME=home, HF_HUB_OFFLINE="1")
    assert offline.stdout == online.stdout, offline.stderr
    assert hub.seen == []


def test_offline_without_the_file_says_so(tmp_path: Path) -> None:
    done = run(FETCH, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("mlxrun.errors.HubError: org/repo:Q4_0 is not in the cache")
    assert "HF_HUB_OFFLINE" in last


def test_huggingface_hub_is_not_imported_for_a_path(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(BODY)
    code = f"import sys; from mlxrun.hub import resolve; resolve({str(tmp_path / 'm.gguf')!r}); "
    done = run(code + "print('huggingface_hub' in sys.modules, 'mlx.core' in sys.modules)")
    assert done.stdout == "False False\n", done.stderr
