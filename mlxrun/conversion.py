"""Sources that users name, brought to the converter and to the tokenizer."""

from __future__ import annotations

from pathlib import Path

from converters.convert import check_policy
from converters.convert import convert as convert_file
from converters.directory.convert import convert_directory
from converters.directory.recipe import Recipe, recipe
from converters.report import ConversionReport
from converters.sink import Progress
from mlxrun.errors import ConversionError, TokenizerError
from mlxrun.hub import resolve
from mlxrun.loading.adapters import AdapterChoice, merging
from mlxrun.loading.preparation import prepare
from mlxrun.text.tokenizer import Tokenizer
from mlxrun.text.tokenizer import load_tokenizer as read_tokenizer


def convert(
    src: str | Path,
    dst: str | Path | None = None,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str | None = None,
    keep: str | None = None,
    dtype: str | None = None,
    policy: str | None = None,
    adapter: AdapterChoice = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert a GGUF file or a model directory to a directory that mlxrun and mlx-lm load.

    Args:
        src: a ``.gguf`` file, a shard of a split one, a directory of safetensors, or
            ``org/repo[:QUANT]`` on the hub.
        dst: directory to create; by default ``NAME-mlx`` in the working directory.
        bits, group_size, mode, keep, dtype: what becomes of a directory's matrices; see
            :func:`converters.directory.recipe.recipe`.
        policy: what becomes of a GGUF's: ``exact``, ``near`` (default) or ``compact``; see
            ``converters.policy``.
        adapter: LoRA adapters to merge into the weights, as :func:`mlxrun.load` takes them. What
            they touch is stored in the form that a policy or a directory's own choices ask for.
        overwrite: replace a directory that holds nothing but an earlier conversion, once the new
            one is complete.
        progress: called with (bytes read, bytes in all, tensor name).

    Raises:
        MlxrunError: one of its subclasses says what is wrong.
    """
    choice = check_choices(bits, group_size, mode, keep, dtype, policy)
    path = resolve(src)
    if path.is_dir():
        if policy is not None:
            raise ConversionError(
                f"{path.name} is a directory, and policies are for GGUF files",
                hint="Say bits, group size and mode instead",
            )
        report = convert_directory(
            path,
            dst,
            choice,
            prepare,
            merge=merging(adapter),
            overwrite=overwrite,
            progress=progress,
        )
        try:
            read_tokenizer(path)  # its files are copied as they are
        except TokenizerError as error:
            report.warnings.append(str(error))
        return report
    if choice != Recipe():
        raise ConversionError(
            f"{path.name} is a GGUF file: its weights keep their own bits, as a policy says",
            hint="Convert it without these options, then the directory that it becomes with them",
        )
    return convert_file(
        path,
        dst,
        policy=policy or "near",
        overwrite=overwrite,
        merge=merging(adapter),
        progress=progress,
    )


def check_choices(
    bits: int | None = None,
    group_size: int | None = None,
    mode: str | None = None,
    keep: str | None = None,
    dtype: str | None = None,
    policy: str | None = None,
) -> Recipe:
    """The recipe that options of :func:`convert` say.

    Raises:
        ConversionError: an option has no such value, or two do not go together.
    """
    choice = recipe(bits, group_size, mode, keep, dtype)
    if policy is not None:
        check_policy(policy)
        if choice != Recipe():
            raise ConversionError(
                "a policy is for GGUF files; bits, group size, mode, keep and dtype for directories"
            )
    return choice


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer of a model, or of a GGUF that holds nothing but a vocabulary.

    Args:
        source: as :func:`mlxrun.load` takes it.

    Raises:
        MlxrunError: one of its subclasses says what is wrong.
    """
    return read_tokenizer(resolve(source))
