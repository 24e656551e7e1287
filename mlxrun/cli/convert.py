"""``mlxrun convert``: a GGUF file to a model directory."""

from __future__ import annotations

import json
import shlex
from collections import defaultdict
from typing import TYPE_CHECKING

import click

from mlxrun.cli.console import Bar, Output, size, table
from mlxrun.cli.loading import POLICIES

if TYPE_CHECKING:
    from converters.report import ConversionReport, TensorRecord


@click.command("convert")
@click.argument("source")
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Directory to create.  [default: NAME-mlx in the working directory]",
)
@click.option(
    "--policy",
    type=click.Choice(POLICIES),
    default="near",
    show_default=True,
    help="How close the weights must stay to the file's.",
)
@click.option("--overwrite", is_flag=True, help="Replace a model directory that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
def command(source: str, output: str | None, policy: str, overwrite: bool, as_json: bool) -> None:
    """Convert a GGUF file to a model directory.

    mlxrun and stock mlx-lm load what this writes. SOURCE is a .gguf file, a shard of a split one,
    or org/repo:QUANT on the hub.

    The policy exact keeps every weight bit-equal or refuses; near keeps the file's own codes where
    MLX can hold them and else the smallest form with at most 1% error; compact lets no tensor grow
    by more than half a bit a weight.

    \b
    Examples:
      mlxrun convert model-Q4_K_M.gguf
      mlxrun convert model-Q4_K_M.gguf -o ~/models/mine --policy exact
    """
    from mlxrun.conversion import convert
    from mlxrun.hub import resolve

    with Bar("Downloading") as bar:
        path = resolve(source, progress=bar)
    with Bar("Converting", delay=0) as bar:
        report = convert(path, output, policy=policy, overwrite=overwrite, progress=bar)
    if as_json:
        summary = {"path": report.path, "seconds": report.seconds, "bytes": report.nbytes}
        print(json.dumps(summary | report.to_dict()))
    else:
        _print_report(report)


def _print_report(report: ConversionReport) -> None:
    out = Output()
    groups: dict[tuple[str, str, str], list[TensorRecord]] = defaultdict(list)
    for record in report.tensors:
        groups[record.type, record.form, record.fidelity].append(record)
    columns = ("GGUF", "MLX", "#tensors", "fidelity", "#worst RMSE", "#bits before", "#after")
    out.print(table("", columns, [_row(*key, group) for key, group in groups.items()]))
    out.print()
    for skipped in report.skipped:
        out.print(f"skipped {skipped['name']} ({skipped['type']}): {skipped['reason']}")
    for note in report.notes():
        out.print(f"note: {note}")
    out.print(
        f"{len(report.tensors)} tensors, {report.bits_before:.2f} -> {report.bits_after:.2f} bits "
        f"a weight, {size(report.nbytes)}, {report.seconds:.1f} s"
    )
    out.print(f"Wrote {report.path}")
    out.print(f"Next: mlxrun chat {shlex.quote(str(report.path))}")


def _row(kind: str, form: str, fidelity: str, group: list[TensorRecord]) -> tuple[object, ...]:
    errors = [record.rmse for record in group if record.rmse is not None]
    worst = f"{max(errors):.2g}" if errors else ""
    weights = sum(record.elements for record in group)
    before = sum(record.bits_before * record.elements for record in group) / weights
    after = sum(record.bits_after * record.elements for record in group) / weights
    return kind, form, len(group), fidelity, worst, f"{before:.4g}", f"{after:.4g}"
