"""Who may import whom, by the source, and the modules in memory after common commands."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import Tiny

from tools.lines import (
    DEVICE,
    PACKAGES,
    circles,
    import_graph,
    module_name,
    outside_kernels,
    read_tree,
)

ROOT = Path(__file__).resolve().parent.parent


def imports_of(source: str, path: str) -> set[str]:
    """Every module that a file imports anywhere, also inside functions and for types only."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a name comes from"
            assert node.module is not None
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


SOURCES = read_tree()
MODULES = {module_name(path): imports_of(source, path) for path, source in SOURCES.items()}


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


# Packages from the top down: each may import itself and those named here.
ALLOWED: dict[str, tuple[str, ...]] = {
    "converters": (),
    "mlxrun.errors": ("converters.errors",),
    "mlxrun.files": ("converters.staging",),
    "mlxrun.config": (
        "converters.quantize",
        "mlxrun.kv_cache",
        "mlxrun.products",
        "mlxrun.errors",
    ),
    "mlxrun.sampling_params": ("converters", "mlxrun.config", "mlxrun.errors"),
    "mlxrun.outputs": ("mlxrun.config", "mlxrun.sampling_params", "mlxrun.errors"),
    "mlxrun.memory.device": ("mlxrun.kernels", "mlxrun.errors"),
    "mlxrun.memory.footprint": (
        "mlxrun.config",
        "mlxrun.kernels",
        "mlxrun.kv_cache",
        "mlxrun.models.config",
    ),
    "mlxrun.memory.plan": (
        "mlxrun.config",
        "mlxrun.loader",
        "mlxrun.memory",
        "mlxrun.model",
        "mlxrun.models",
        "mlxrun.kernels",
        "mlxrun.kv_cache",
        "mlxrun.errors",
    ),
    "mlxrun.loader": (
        "mlxrun.config",
        "converters",
        "mlxrun.kernels",
        "mlxrun.products",
        "mlxrun.model",
        "mlxrun.models",
        "mlxrun.weights",
        "mlxrun.memory.device",
        "mlxrun.errors",
    ),
    "mlxrun.tokenizer": ("converters", "mlxrun.errors"),
    "mlxrun.kv_cache": ("mlxrun.config", "mlxrun.errors", "mlxrun.files", "mlxrun.kernels"),
    "mlxrun.model": (
        "mlxrun.config",
        "mlxrun.kv_cache",
    ),
    "mlxrun.kernels": (
        "converters",
        "mlxrun.errors",
        "mlxrun.files",
        "mlxrun.__version__",
    ),
    "mlxrun.products": ("mlxrun.errors",),
    "mlxrun.weights": (
        "mlxrun.config",
        "converters",
        "mlxrun.models.config",
        "mlxrun.models.families",
        "mlxrun.errors",
        "mlxrun.kernels",
    ),
    "mlxrun.models": (
        "mlxrun.config",
        "converters",
        "mlxrun.model",
        "mlxrun.memory.footprint",
        "mlxrun.kernels",
        "mlxrun.weights",
        "mlxrun.kv_cache",
        "mlxrun.errors",
    ),
    "mlxrun.lock": ("mlxrun.errors", "mlxrun.kernels"),
    "mlxrun.display": (),
    "mlxrun.sampling": (
        "mlxrun.outputs",
        "mlxrun.sampling_params",
        "mlxrun.kernels",
        "mlxrun.errors",
        "mlxrun.tokenizer",
    ),
    "mlxrun.engine": (
        "mlxrun.config",
        "mlxrun.outputs",
        "mlxrun.sampling_params",
        "mlxrun.model",
        "mlxrun.kv_cache",
        "mlxrun.memory",
        "mlxrun.tokenizer",
        "mlxrun.sampling",
        "mlxrun.lock",
        "mlxrun.kernels",
        "mlxrun.display",
        "mlxrun.errors",
    ),
    "mlxrun.eval": (
        "mlxrun.config",
        "mlxrun.outputs",
        "mlxrun.model",
        "mlxrun.kv_cache",
        "mlxrun.tokenizer",
        "mlxrun.engine",
        "mlxrun.sampling",
        "mlxrun.lock",
        "mlxrun.display",
        "mlxrun.memory.plan",
        "mlxrun.kernels",
        "mlxrun.llm",
        "mlxrun.errors",
    ),
    "mlxrun.hub": ("mlxrun.kernels", "mlxrun.memory", "mlxrun.errors", "converters"),
}
WITHOUT_MLX = (
    "mlxrun.products",
    "mlxrun.tokenizer",
    "mlxrun.config",
    "mlxrun.outputs",
    "mlxrun.sampling_params",
    "mlxrun.engine.scheduler",
    "mlxrun.kv_cache.options",
    "mlxrun.eval.windows",
    "mlxrun.bench.workloads",
    "mlxrun.bench.runner",
    "mlxrun.bench.report",
    "mlxrun.analysis.machine",
    "mlxrun.analysis.chips",
    "mlxrun.analysis.costs",
    "mlxrun.analysis.dataset",
    "mlxrun.analysis.plot",
    "converters.gguf.reader",
    "converters.huggingface.tokenizer_files",
)


@pytest.mark.parametrize("package", ALLOWED)
def test_rooms_import_only_what_lies_below_them(package: str) -> None:
    members = [name for name in MODULES if within(name, package)]
    assert members
    for name in members:
        ours = {m for m in MODULES[name] if within(m, *PACKAGES) and m != "mlxrun"}
        above = {m for m in ours if not within(m, package, *ALLOWED[package])}
        assert not above, f"{name} imports {above}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert not [sorted(circle) for circle in circles(import_graph(SOURCES))]


def test_only_kernels_ask_for_the_device() -> None:
    asking = [path for path, text in outside_kernels(SOURCES).items() if DEVICE.search(text)]
    assert not asking


def test_nothing_below_imports_the_front() -> None:
    front = ("mlxrun.cli", "mlxrun.server", "mlxrun.bench", "mlxrun.analysis")
    for name, imported in MODULES.items():
        if not within(name, *front, "mlxrun.__main__"):
            assert not {m for m in imported if within(m, *front)}, name


def test_only_the_command_line_imports_tools_on_top_of_the_runtime() -> None:
    for name, imported in MODULES.items():
        if not within(name, "mlxrun.cli", "mlxrun.analysis"):
            assert not {m for m in imported if within(m, "mlxrun.analysis")}, name


def test_the_converter_never_imports_mlxrun() -> None:
    for name, imported in MODULES.items():
        if within(name, "converters"):
            assert not {m for m in imported if within(m, "mlxrun")}, name


@pytest.mark.parametrize("room", WITHOUT_MLX)
def test_rooms_that_never_name_mlx(room: str) -> None:
    for name, imported in MODULES.items():
        if within(name, room):
            assert not {m for m in imported if within(m, "mlx", "mlx_lm")}, name


MLX_LM = ("mlxrun.models.mlx_lm", "mlxrun.analysis.model_cost", "mlxrun.bench.baselines")


def test_transformers_is_never_imported_and_mlx_lm_only_as_a_fallback_or_to_measure_against() -> (
    None
):
    for name, imported in MODULES.items():
        assert not {m for m in imported if within(m, "transformers", "torch")}, name
        if not within(name, *MLX_LM):
            assert not {m for m in imported if within(m, "mlx_lm")}, name


def loaded_after(code: str, *arguments: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after running ``code``."""
    script = f"{code}\nimport json, sys\nprint()\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


HEAVY = {"mlx", "mlx.core", "mlx_lm", "transformers", "torch"}
FREE_OF_MLX = sorted(name for name in MODULES if within(name, *WITHOUT_MLX))


def test_they_do_not_load_mlx_by_way_of_others_either() -> None:
    code = "\n".join(f"import {name}" for name in FREE_OF_MLX)
    assert not HEAVY & loaded_after(code)


@pytest.mark.parametrize(
    "code",
    [
        "import mlxrun",
        "import mlxrun.cli.main",
        "import mlxrun; dir(mlxrun); mlxrun.__version__",
        "import mlxrun.errors, converters.errors",
    ],
)
def test_starting_up_loads_nothing_heavy(code: str) -> None:
    slow = {"numpy", "tokenizers", "sentencepiece", "jinja2", "gguf", "huggingface_hub", "rich"}
    assert not (HEAVY | slow) & loaded_after(code)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nsys.argv = ['mlxrun', '--help']\n"
        "from mlxrun.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass"
    )
    assert not (HEAVY | {"numpy"}) & loaded_after(code)


GENERATE = """
import sys, mlxrun
llm = mlxrun.load(sys.argv[1])
assert llm.generate([1, 5, 6], max_tokens=3, temperature=0, ignore_eos=True).tokens
llm.chat([{"role": "user", "content": "a"}], max_tokens=2)
"""


def test_running_a_gguf_loads_neither_mlx_lm_nor_transformers(tmp_path: Path) -> None:
    source = Tiny(kinds={"*": "Q4_0"}).write(tmp_path / "x.gguf")
    loaded = loaded_after(GENERATE, str(source))
    assert "mlx.core" in loaded
    assert not {"mlx_lm", "transformers", "torch", "gguf", "huggingface_hub"} & loaded


def test_converting_loads_neither_mlx_lm_nor_transformers(tmp_path: Path) -> None:
    source = Tiny().write(tmp_path / "x.gguf")
    code = "import sys, mlxrun\nmlxrun.convert(sys.argv[1], sys.argv[2])"
    loaded = loaded_after(code, str(source), str(tmp_path / "out"))
    assert not {"mlx_lm", "transformers", "torch"} & loaded


def test_public_names_exist_and_are_the_ones_listed() -> None:
    import mlxrun

    for name in mlxrun.__all__:
        assert getattr(mlxrun, name) is not None
    assert set(mlxrun.__all__) <= set(dir(mlxrun))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mlxrun.nothing  # noqa: B018
