"""Which files a name picks from a repository's list."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxrun.errors import HubError
from mlxrun.hub.names import HubFile, HubName, choose, size_text


def files(*paths: str) -> list[HubFile]:
    """Files of 1 GB, 2 GB, ... in the order given."""
    return [HubFile(path, index * 10**9) for index, path in enumerate(paths, 1)]


def first(source: str, *paths: str) -> str:
    return choose(HubName.parse(source), files(*paths)).first


MANY = (
    "m-Q2_K.gguf",
    "m-Q4_K_M.gguf",
    "m-Q4_K_S.gguf",
    "m-IQ4_XS.gguf",
    "m-F16.gguf",
    "m-BF16.gguf",
)


@pytest.mark.parametrize(
    ("quant", "path"),
    [
        ("Q2_K", "m-Q2_K.gguf"),
        ("q4_k_s", "m-Q4_K_S.gguf"),
        ("iq4_xs", "m-IQ4_XS.gguf"),
        ("F16", "m-F16.gguf"),
        ("bf16", "m-BF16.gguf"),
    ],
)
def test_a_quantization_is_a_whole_word_in_any_case(quant: str, path: str) -> None:
    assert first(f"a/b:{quant}", *MANY) == path


@pytest.mark.parametrize(
    "path", ["m.Q8_0.gguf", "m_Q8_0.gguf", "q8_0.gguf", "Q8_0/m.gguf", "M-q8_0-v2.gguf"]
)
def test_separators_do_not_matter(path: str) -> None:
    assert first("a/b:Q8_0", "m-Q4_0.gguf", path, "m-IQ8_0.gguf", "m-Q8_0_L.gguf") == path


def test_the_plain_one_wins_over_the_longer_label() -> None:
    paths = ("m-UD-Q4_K_XL.gguf", "m-Q4_K_XL.gguf")
    assert first("a/b:Q4_K_XL", *paths) == paths[1]
    assert first("a/b:UD-Q4_K_XL", *paths) == paths[0]
    assert first("a/b:Q4_K_XL", paths[0], "m-Q2_K.gguf") == paths[0]


def test_without_a_quantization_the_only_file_or_the_usual_one() -> None:
    assert first("a/b", "m-Q2_K.gguf") == "m-Q2_K.gguf"
    assert first("a/b", *MANY) == "m-Q4_K_M.gguf"
    assert first("a/b", "m-Q2_K.gguf", "mmproj-F16.gguf", "m.imatrix.gguf") == "m-Q2_K.gguf"
    assert first("a/b/mmproj-F16.gguf", "m-Q2_K.gguf", "mmproj-F16.gguf") == "mmproj-F16.gguf"


@pytest.mark.parametrize(
    "other",
    ["mmproj-F16.gguf", "m.imatrix.gguf", "imatrix_unsloth.gguf", "ggml-vocab-llama.gguf",
     "m-vocab.gguf", "m-lora-F16.gguf", "adapters/lora.gguf", "m-adapter-Q4_K_M.gguf"],
)  # fmt: skip
def test_what_goes_with_a_model_is_not_offered_as_one(other: str) -> None:
    assert first("a/b", "m-Q4_K_M.gguf", other) == "m-Q4_K_M.gguf"
    with pytest.raises(HubError) as caught:
        first("a/b:Q8_0", "m-Q4_K_M.gguf", other)
    assert other not in str(caught.value)
    assert first(f"a/b/{other}", "m-Q4_K_M.gguf", other) == other


def test_a_model_may_be_named_after_the_adapter_in_it() -> None:
    assert first("a/b", "m-lora-merged-Q2_K.gguf") == "m-lora-merged-Q2_K.gguf"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a/b", r"a/b has 2 models: Q2_K \(1\.0 GB\); Q3_K_S \(2\.0 GB\)\. .*a/b:Q2_K$"),
        ("a/b:Q8_0", r"a/b has no Q8_0 model: Q2_K \(1\.0 GB\); Q3_K_S \(2\.0 GB\)"),
        ("a/b:Q3_K", r"a/b has no Q3_K model"),
        ("a/b/x.gguf", r"a/b has no file x\.gguf\. It has m-Q2_K\.gguf \(1\.0 GB\); m-Q3"),
    ],
)
def test_what_fits_none_lists_the_choices_with_sizes(source: str, message: str) -> None:
    with pytest.raises(HubError, match=message):
        first(source, "m-Q2_K.gguf", "m-Q3_K_S.gguf")


def test_what_fits_several_lists_those_by_path() -> None:
    message = (
        r"a/b has 2 Q2_K models: m-Q2_K\.gguf \(1\.0 GB\); n-Q2_K\.gguf \(2\.0 GB\)\. .* a/b/m-"
    )
    with pytest.raises(HubError, match=message):
        first("a/b:Q2_K", "m-Q2_K.gguf", "n-Q2_K.gguf", "m-Q8_0.gguf")


def test_every_example_in_an_error_can_be_asked_for() -> None:
    paths = ("x/m-Q2_K.gguf", "y/m-Q2_K.gguf", "odd.gguf", "m-MXFP4_MOE.gguf", "m-UD-IQ1_S.gguf")
    for path in paths:
        others = [other for other in paths if other != path]
        with pytest.raises(HubError) as caught:
            first("a/b", path, *others)
        example = str(caught.value).rsplit(" ", 1)[1]
        assert first(example, *paths) in paths


@given(st.permutations(range(1, 5)), st.sampled_from(["", "Q8_0/"]))
def test_shards_come_in_order_whichever_is_named(order: list[int], folder: str) -> None:
    paths = [f"{folder}m-Q8_0-0000{index}-of-00004.gguf" for index in order]
    for source in ("a/b", "a/b:Q8_0", f"a/b/{paths[0]}"):
        choice = choose(
            HubName.parse(source), files("m-Q2_K.gguf", *paths) if ":" in source else files(*paths)
        )
        assert [file.path for file in choice.files] == sorted(paths)
        assert choice.first == sorted(paths)[0]


def test_a_missing_shard_is_named() -> None:
    with pytest.raises(HubError, match=r"lacks 1 of 3 shards of .*m-00002-of-00003\.gguf"):
        first("a/b", "m-00001-of-00003.gguf", "m-00003-of-00003.gguf")
    with pytest.raises(HubError, match=r"model-00002-of-00002\.safetensors"):
        first("a/b", "config.json", "model-00001-of-00002.safetensors")


@pytest.mark.parametrize(
    ("paths", "kinds"),
    [
        (("config.json", "pytorch_model.bin"), r"\.bin, \.json"),
        (("adapter_model.safetensors",), r"\.safetensors"),
        (("original/config.json", "original/model.safetensors"), r"\.json, \.safetensors"),
        ((), "nothing"),
    ],
)
def test_a_repository_without_a_model_says_what_it_has(paths: tuple[str, ...], kinds: str) -> None:
    with pytest.raises(HubError, match=f"neither GGUF files nor .* only {kinds}"):
        first("a/b", *paths)


def test_a_quantization_of_a_repository_without_gguf_is_an_error() -> None:
    with pytest.raises(HubError, match="no GGUF files, so no Q4_0"):
        first("a/b:Q4_0", "config.json", "model.safetensors")


def test_small_files_come_before_weights() -> None:
    choice = choose(HubName("a/b"), files("model.safetensors", "config.json", "vocab.json"))
    assert [file.path for file in choice.files] == [
        "config.json",
        "vocab.json",
        "model.safetensors",
    ]
    assert choice.first == ""


NAMES = st.from_regex(
    r"\A(model|m|config|mmproj)[-._/]?(Q4_K_M|q8_0|F16)?(-0000[0-3]-of-0000[0-3])?"
    r"\.(gguf|safetensors|json)\Z"
)


@given(st.lists(NAMES, unique=True), st.sampled_from(["a/b", "a/b:Q8_0", "a/b/m-Q4_K_M.gguf"]))
def test_any_list_gives_one_whole_model_or_an_error(paths: list[str], source: str) -> None:
    listed = files(*paths)
    try:
        choice = choose(HubName.parse(source), listed)
    except HubError as error:
        assert "\n" not in str(error)
        return
    assert set(choice.files) <= set(listed)
    assert choice.size == sum(file.size for file in choice.files)
    assert choice.first == "" or choice.first == choice.files[0].path
    if ":" in source:
        assert "q8_0" in choice.first.lower()


@pytest.mark.parametrize(("size", "text"), [(1, "0.0 MB"), (51_200, "0.1 MB"), (4.7e9, "4.7 GB")])
def test_sizes_are_decimal(size: float, text: str) -> None:
    assert size_text(int(size)) == text
