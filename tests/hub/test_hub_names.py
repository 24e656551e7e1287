"""Hub names: every spelling that users paste, and nothing but a name or one error for the rest."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxrun.errors import SourceError
from mlxrun.hub.names import HubName, is_safe

REPO = HubName("org/repo")
FILE = HubName("org/repo", file="sub/x-Q8_0.gguf")
PAGE = "https://huggingface.co/org/repo"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("org/repo", REPO),
        ("hf.co/org/repo", REPO),
        ("hf://org/repo", REPO),
        ("https://huggingface.co/org/repo", REPO),
        ("https://huggingface.co/org/repo/", REPO),
        ("http://hf.co/org/repo", REPO),
        ("https://huggingface.co/org/repo/tree/main", REPO),
        ("org/repo:Q4_K_M", HubName("org/repo", quant="Q4_K_M")),
        ("hf.co/org/repo:q8_0", HubName("org/repo", quant="q8_0")),
        ("org/repo:UD-Q4_K_XL@v1.0", HubName("org/repo", quant="UD-Q4_K_XL", revision="v1.0")),
        ("org/repo@v1.0:UD-Q4_K_XL", HubName("org/repo", quant="UD-Q4_K_XL", revision="v1.0")),
        ("org/repo@refs/pr/1", HubName("org/repo", revision="refs/pr/1")),
        ("org/repo/sub/x-Q8_0.gguf", FILE),
        (f"{PAGE}/blob/main/sub/x-Q8_0.gguf", FILE),
        (f"{PAGE}/resolve/main/sub/x-Q8_0.gguf?download=true", FILE),
        (f"{PAGE}/blob/refs%2Fpr%2F1/a.gguf", HubName("org/repo", None, "a.gguf", "refs/pr/1")),
        ("Org-1/re.po_2-GGUF", HubName("Org-1/re.po_2-GGUF")),
    ],
)
def test_spellings(text: str, name: HubName) -> None:
    assert HubName.parse(text) == name


@pytest.mark.parametrize(
    "text",
    [
        "",
        "repo",
        "org/",
        "/repo",
        "org//repo",
        "org/repo:",
        "org/repo@",
        "org/repo:Q4:Q5",
        "org/repo@a@b",
        "org/repo/x.gguf:Q4_0",
        "org/repo/x.bin",
        "org/repo/../x.gguf",
        "org/repo/.gguf/..",
        "org/re--po",
        "org/re..po",
        "org/-repo",
        "org/repo.",
        "org/repo.git",
        "org/re po",
        "org/repo:Q4 K",
        "org/repo@../../x",
        "org/repo@/etc",
        "org/" + "x" * 96,
        "https://example.com/org/repo",
        "https://huggingface.co/datasets",
        "org/repo\n",
    ],
)
def test_what_is_no_name_says_what_one_looks_like(text: str) -> None:
    with pytest.raises(SourceError, match="org/repo:QUANT") as caught:
        HubName.parse(text)
    assert "\n" not in str(caught.value)


ALPHABET = st.text(st.sampled_from("ab/Q4_0:@.-~\\ %?#\0\né\ud800") | st.characters(), max_size=30)
LIKELY = st.builds("org{}repo{}".format, ALPHABET, ALPHABET)


@given(ALPHABET | LIKELY | st.builds("hf.co/a/b{}".format, ALPHABET))
def test_any_text_is_a_name_that_stays_in_its_place_or_an_error(text: str) -> None:
    try:
        name = HubName.parse(text)
    except SourceError as error:
        assert "\n" not in str(error)
        return
    assert HubName.parse(str(name)) == name
    for path in (name.repo, name.file or "x", name.revision):
        assert is_safe(path)
        assert not path.startswith("/")


@given(st.from_regex(r"\A[a-z0-9]{1,9}/[a-z0-9]{1,9}\Z"), st.sampled_from(["", ":Q4_0", "/f.gguf"]))
def test_prefixes_change_nothing(repo: str, rest: str) -> None:
    assert HubName.parse(f"https://hf.co/{repo}{rest}") == HubName.parse(repo + rest)
