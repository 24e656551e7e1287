"""``mlxrun.convert``: a source by path or name on the hub, converted to a model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

import mlx.core as mx

from converters.convert import Progress, Source
from converters.convert import convert as write_checkpoint
from converters.gguf.source import GGUFSource
from converters.huggingface.names import form_of, normalize, stays, text_config
from converters.huggingface.source import DirectorySource, Plan
from converters.huggingface.weights import Weights
from converters.quantize.recipe import Recipe, recipe
from converters.report import ConversionReport
from mlxrun.config import AdapterChoice, ConversionConfig, ConversionOptions
from mlxrun.errors import ConversionError, TokenizerError
from mlxrun.hub import resolve
from mlxrun.loader import definition
from mlxrun.models.config import ModelConfig
from mlxrun.models.transformer import Transformer
from mlxrun.tokenizer.tokenizer import Tokenizer
from mlxrun.tokenizer.tokenizer import load_tokenizer as read_tokenizer
from mlxrun.weights.adapters import merging
from mlxrun.weights.parameters import Parameters


def convert(
    src: str | Path,
    dst: str | Path | None = None,
    *,
    adapter: AdapterChoice = (),
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Unpack[ConversionOptions],
) -> ConversionReport:
    """Convert a GGUF file or a model directory to a directory that mlxrun and mlx-lm load.

    Args:
        src: a ``.gguf`` file, a shard of a split one, a directory of safetensors, or
            ``org/repo[:QUANT]`` on the hub.
        dst: directory to create; by default ``NAME-mlx`` in the working directory.
        adapter: LoRA adapters to merge into the weights, as :func:`mlxrun.load` takes them.
        overwrite: replace a directory that holds nothing but an earlier conversion, once the new
            one is complete.
        progress: called with (bytes read, bytes in all, tensor name).
        options: see :class:`mlxrun.config.ConversionConfig`; ``policy`` is for GGUF files
            (:mod:`converters.quantize.policy`), the others for directories
            (:func:`converters.quantize.recipe.recipe`).

    Raises:
        MlxrunError: its subclasses say what failed.
    """
    config = ConversionConfig.of(options, "adapter", "overwrite", "progress")
    choice = recipe_of(config)
    path = resolve(src)
    source = _source(path, choice, config.policy)
    report = write_checkpoint(
        source, dst, overwrite=overwrite, merge=merging(adapter), progress=progress
    )
    if path.is_dir():
        try:
            read_tokenizer(path)  # its files are copied as they are
        except TokenizerError as error:
            report.warnings.append(str(error))
    return report


def _source(path: Path, choice: Recipe, policy: str | None) -> Source:
    if path.is_dir():
        if policy is not None:
            raise ConversionError(
                f"{path.name} is a directory, and policies are for GGUF files",
                hint="Say bits, group size and mode instead",
            )
        return DirectorySource(path, choice, prepare)
    if choice != Recipe():
        raise ConversionError(
            f"{path.name} is a GGUF file: its weights keep their own bits, as a policy says",
            hint="Convert it without these options, then the directory that it becomes with them",
        )
    return GGUFSource(path, policy or "near")


def recipe_of(config: ConversionConfig) -> Recipe:
    """The recipe of a config; ConversionError if two of its options contradict each other."""
    choice = recipe(config.bits, config.group_size, config.mode, config.keep, config.dtype)
    if config.policy is not None and choice != Recipe():
        raise ConversionError(
            "a policy is for GGUF files; bits, group size, mode, keep and dtype for directories"
        )
    return choice


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer of a model, or of a GGUF that holds nothing but a vocabulary.

    Args:
        source: as :func:`mlxrun.load` takes it.

    Raises:
        MlxrunError: its subclasses say what failed.
    """
    return read_tokenizer(resolve(source))


NO_PLACE = "the model has no such parameter"
# Keys that say how the source was stored, or that name code which is not copied.
_SOURCE_ONLY = ("quantization", "quantization_config", "auto_map")


def prepare(config: dict[str, Any], weights: Weights) -> Plan:
    """How a directory's weights are converted: checked against the model itself, none is read."""
    config = text_config(config)
    kept = {key: value for key, value in config.items() if key not in _SOURCE_ONLY}
    defined = definition(config)
    if not isinstance(defined, ModelConfig):
        from mlxrun.models.mlx_lm import conversion_plan

        return conversion_plan(defined, kept, weights)
    normalize(config, weights, stock=True)
    # A model of zeros checks names and shapes.
    whole = Weights(dict(weights.arrays), dict(weights.layouts))
    normalize(config, whole)
    sketch = {name: _placeholder(array) for name, array in whole.arrays.items()}
    params = Parameters(sketch, whole.layouts, mx.float32, fuse=False)
    Transformer(defined, params)
    for name in params.unused():
        weights.skip(name, NO_PLACE)
    return Plan(
        kept | {"tie_word_embeddings": defined.tied},
        weights,
        form_of(config),
        lambda name: stays(config, name),
    )


def _placeholder(array: mx.array) -> mx.array:
    """Zeros of the same shape that take no memory, floats as they will be cast."""
    floating = mx.issubdtype(array.dtype, mx.floating)
    return mx.broadcast_to(mx.zeros((), mx.float32 if floating else array.dtype), array.shape)
