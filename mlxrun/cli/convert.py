"""``mlxrun convert``: a GGUF file or a Hugging Face directory to a model directory."""

from __future__ import annotations

import json
import shlex
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click

from mlxrun.cli.console import Bar, Table, note, show, size
from mlxrun.cli.loading import located
from mlxrun.cli.options import Adapters, ModelName, with_merged_adapter, with_options
from mlxrun.config import ConversionConfig, options_of

# More tensors than that with one reason are listed as one.
_LISTED = 3

if TYPE_CHECKING:
    from converters.report import ConversionReport, TensorRecord


@click.command("convert")
@click.argument("source", type=ModelName())
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Directory to create.  [default: NAME-mlx in the working directory]",
)
@with_options(options_of(ConversionConfig), "Options")
@with_merged_adapter
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace a directory that holds nothing but an earlier conversion.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
def convert_command(
    source: str,
    output: str | None,
    adapter: Adapters,
    overwrite: bool,
    as_json: bool,
    **choices: Any,
) -> None:
    """Convert a GGUF file or a Hugging Face model to a directory.

    mlxrun and stock mlx-lm load the result. SOURCE is a .gguf file, a shard of a split one,
    a directory of safetensors, or org/repo[:QUANT] on the hub.

    A GGUF keeps its own quantization, as a policy says: exact keeps every weight bit-equal or
    refuses; near keeps the file's own codes where MLX can store them, else takes the smallest form
    with at most 1% error; compact lets no tensor grow by more than half a bit a weight
    (to no less than 2.25 bits, which MLX's smallest form takes).

    A directory is quantized as --bits, --group-size and --mode say, and copied in half precision
    without them. Norms, biases and matrices that do not divide into groups stay floats, routers of
    experts get 8 bits. --keep gives some matrices another form: bits (8), bits and group size
    (6/32), a mode (mxfp8) or float. Its patterns are a part of a name (embed), the whole name with
    * and ? (*.mlp.gate), with ranges of layers (layers.0-3.), or mixed: the head, and the values
    and down projections of some layers, as in llama.cpp's Q4_K_M. The last match counts.

    A matrix with an --adapter merged into it gets new codes: from a GGUF the form that the policy
    finds near enough (with exact, float32), from a directory its own form again or the one asked
    for. The report gives the error of each against the exact sum.

    \b
    Examples:
      mlxrun convert model-Q4_K_M.gguf
      mlxrun convert model-Q4_K_M.gguf -o ~/models/mine --policy exact
      mlxrun convert model-Q4_K_M.gguf --adapter lora.gguf:0.8 --policy compact
      mlxrun convert org/repo --bits 4 --keep lm_head=8,embed=8
      mlxrun convert ./directory --bits 3 --group-size 32 --keep mixed=6
      mlxrun convert ./directory --mode mxfp4 --keep 'layers.0-1.=8,*.v_proj=float'
    """
    from mlxrun.conversion import convert, recipe_of

    recipe_of(ConversionConfig(**choices))  # refuses contradictory options before a download
    path = located(source)
    with Bar("Converting", delay=0) as bar:
        report = convert(
            path, output, adapter=adapter, overwrite=overwrite, progress=bar, **choices
        )
    if as_json:
        summary = {"path": report.path, "seconds": report.seconds, "bytes": report.nbytes}
        print(json.dumps(summary | report.to_dict() | {"warnings": report.warnings}))
    else:
        _print_report(report)


def _print_report(report: ConversionReport) -> None:
    groups: dict[tuple[str, str, str], list[TensorRecord]] = defaultdict(list)
    for record in report.tensors:
        groups[record.type, record.form, record.fidelity].append(record)
    show(Table.of("", [_row(*key, group) for key, group in groups.items()]), "")
    for names, reason in _by_reason((s["name"], s["type"], s["reason"]) for s in report.skipped):
        show(f"skipped {names}: {reason}")
    for names, why in _by_reason((t.name, t.type, t.note) for t in report.tensors if t.note):
        show(f"note: {names}: {why}")
    show(
        f"{len(report.tensors)} tensors, {report.bits_before:.2f} -> {report.bits_after:.2f} bits "
        f"a weight, {size(report.nbytes)}, {report.seconds:.1f} s"
    )
    show(f"Wrote {report.path}")
    for warning in report.warnings:
        note(f"warning: {warning}")
    if not report.warnings:
        show(f"Next: mlxrun chat {shlex.quote(str(report.path))}")


def _by_reason(entries: Iterable[tuple[str, str, str]]) -> Iterator[tuple[str, str]]:
    """Names with their types, and the reason; one line for many of the same reason."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, kind, reason in entries:
        groups[reason].append(f"{name} ({kind})")
    for reason, names in groups.items():
        if len(names) <= _LISTED:
            yield from ((name, reason) for name in names)
        else:
            yield f"{names[0]} and {len(names) - 1} more", reason


def _row(kind: str, form: str, fidelity: str, group: list[TensorRecord]) -> dict[str, object]:
    errors = [record.rmse for record in group if record.rmse is not None]
    weights = max(1, sum(record.elements for record in group))
    return {
        "from": kind,
        "to": form,
        "tensors": len(group),
        "fidelity": fidelity,
        "#worst RMSE": f"{max(errors):.2g}" if errors else "",
        "bits before": sum(record.bits_before * record.elements for record in group) / weights,
        "after": sum(record.bits_after * record.elements for record in group) / weights,
    }
