"""What users ask of a conversion: options, patterns, and what is refused before any work."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters.errors import ConversionError
from converters.quantize.layout import affine
from converters.quantize.recipe import FLOAT, mixed, parse_keep, recipe

LAYERS = 16
MODULES = [
    "model.embed_tokens",
    "lm_head",
    *(
        f"model.layers.{i}.{module}"
        for i in range(LAYERS)
        for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate", "mlp.down_proj")
    ),
]


def kept(keep: str) -> dict[str, str]:
    chosen = recipe(bits=4, keep=keep).named(MODULES)
    return {name: str(form) for name, form in chosen.items()}


FORMS = {
    "8": "affine8 g64",
    "6/32": "affine6 g32",
    "2/128": "affine2 g128",
    "float": "float",
    "16": "float",
    "mxfp4": "mxfp4",
    "mxfp8": "mxfp8",
    "nvfp4": "nvfp4",
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str) -> None:
    assert kept(f"lm_head={form}") == {"lm_head": FORMS[form]}


def test_bits_alone_take_the_group_size_of_the_rest() -> None:
    entries = recipe(bits=4, group_size=32, keep="lm_head=8").keep
    assert entries == {"lm_head": affine(8, 32)}
    assert recipe(mode="mxfp4", keep="lm_head=8").keep == {"lm_head": affine(8, 64)}


PATTERNS: dict[str, list[str]] = {
    "embed": ["model.embed_tokens"],
    "layers.3.": [name for name in MODULES if ".layers.3." in name],
    "*.mlp.gate": [name for name in MODULES if name.endswith("mlp.gate")],
    "model.layers.?.self_attn.q_proj": [f"model.layers.{i}.self_attn.q_proj" for i in range(10)],
    "layers.2-4.mlp.g": [f"model.layers.{i}.mlp.gate" for i in (2, 3, 4)],
    "layers.14-.self_attn.q": [f"model.layers.{i}.self_attn.q_proj" for i in (14, 15)],
    "*.9-10.*.v_proj": [f"model.layers.{i}.self_attn.v_proj" for i in (9, 10)],
}  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(pattern: str) -> None:
    assert sorted(kept(f"{pattern}=8")) == sorted(PATTERNS[pattern])


def test_the_last_entry_decides() -> None:
    chosen = kept("mlp=8,layers.0.=float")
    assert chosen["model.layers.0.mlp.gate"] == "float"
    assert chosen["model.layers.1.mlp.gate"] == "affine8 g64"
    assert kept("layers.0.=float,mlp=8")["model.layers.0.mlp.gate"] == "affine8 g64"


def test_a_tied_embedding_is_the_head() -> None:
    tied = [name for name in MODULES if name != "lm_head"]
    chosen = recipe(bits=4, keep="lm_head=8").named(tied)
    assert list(chosen) == ["model.embed_tokens"]


def test_mixed_is_what_mlx_lm_mixes() -> None:
    """mlx-lm's own predicate is the judge, for every module and several depths."""
    from mlx_lm.convert import mixed_quant_predicate_builder

    for layers in (1, 2, 7, 8, 16, 33):
        names = [
            "model.embed_tokens",
            "lm_head",
            *(
                f"model.layers.{i}.{module}"
                for i in range(layers)
                for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
            ),
        ]

        model = SimpleNamespace(
            layers=[None] * layers, named_modules=lambda names=names: [(n, None) for n in names]
        )
        predicate = mixed_quant_predicate_builder("mixed_4_6", model)
        for name in names:
            assert mixed(name, layers) == (predicate(name, None)["bits"] == 6), (name, layers)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bits of nothing": ({"bits": 7}, "bits must be one of 2, 3, 4, 5, 6, 8, not 7"),
    "bits as text": ({"bits": "4"}, "bits must be one of"),
    "group": ({"bits": 4, "group_size": 16}, "group size must be one of 32, 64, 128, not 16"),
    "group zero": ({"bits": 4, "group_size": 0}, "group size must be one of"),
    "mode": ({"bits": 4, "mode": "fp4"}, "mode must be one of affine, mxfp4"),
    "mxfp4 of 8": ({"bits": 8, "mode": "mxfp4"}, "mxfp4 has 4 bits in groups of 32, not 8 bits"),
    "mxfp8 by 64": ({"group_size": 64, "mode": "mxfp8"}, "mxfp8 has 8 bits in groups of 32"),
    "nvfp4 by 32": ({"group_size": 32, "mode": "nvfp4"}, "nvfp4 has 4 bits in groups of 16"),
    "zero for a mode": ({"bits": 0, "mode": "nvfp4"}, "nvfp4 has 4 bits"),
    "group without bits": ({"group_size": 64}, "needs bits"),
    "mode without bits": ({"mode": "affine"}, "needs bits"),
    "dtype": ({"dtype": "int8"}, "dtype must be one of"),
    "keep of nothing": ({"bits": 4, "keep": "lm_head"}, "'lm_head', which is not pattern=form"),
    "keep without a pattern": ({"bits": 4, "keep": "=8"}, "not pattern=form"),
    "keep of an unknown form": ({"bits": 4, "keep": "lm_head=q6_k"}, "'q6_k' is no form"),
    "keep of 7 bits": ({"bits": 4, "keep": "lm_head=7"}, "bits must be one of"),
    "keep by 16": ({"bits": 4, "keep": "lm_head=8/16"}, "group size must be one of"),
    "empty keep": ({"bits": 4, "keep": ""}, "keep is empty"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_combinations_that_do_not_exist(name: str) -> None:
    options, match = REFUSED[name]
    with pytest.raises(ConversionError, match=match) as caught:
        recipe(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [("lm_haed", "lm_head"), ("v_porj", "v_proj"), ("gates", "mlp.gate"), ("norm", "")],
)
def test_a_pattern_without_a_match_names_the_nearest_module(pattern: str, nearest: str) -> None:
    with pytest.raises(ConversionError, match=f"{pattern!r} that no module.*nearest is.*{nearest}"):
        kept(f"{pattern}=8")


def test_llama_cpps_names_are_translated_in_the_error() -> None:
    with pytest.raises(ConversionError, match=r"llama.cpp's ffn_down is down_proj here"):
        kept("ffn_down=8")


@given(st.text(max_size=40))
def test_no_text_breaks_the_parser(text: str) -> None:
    try:
        entries = parse_keep(text)
    except ConversionError:
        return
    for form in entries.values():
        assert form == FLOAT or form.bits in (2, 3, 4, 5, 6, 8)
    try:
        recipe(keep=text).named(MODULES)
    except ConversionError as error:
        assert "no module" in str(error)
