"""Plots of rates by the number of sequences and by context, from the facts of ``bench --json``.

matplotlib comes with the extra ``plot`` and is imported only to plot.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mlxrun.bench.runner import OURS
from mlxrun.errors import MissingExtraError, ParameterError, PictureError
from mlxrun.files import check_writable, replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Facts = dict[str, Any]

FORMATS = (".png", ".svg", ".pdf", ".html")
_PANEL = (6.4, 4.4)  # inches
_UNDATED = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
# Rates further apart than this share an axis only on a logarithmic scale.
_WIDE = 20


class Panel(NamedTuple):
    title: str
    across: str  # label of the horizontal axis
    lines: list[Line]


class Line(NamedTuple):
    label: str
    points: dict[int, tuple[float, float, float]]  # median, lowest, highest tokens/s by abscissa
    limit_of: str | None = None  # label of the line of which this is the roofline


def check(path: Path) -> None:
    """Check before anything is measured that a plot can be written."""
    if path.suffix.lower() not in FORMATS:
        raise ParameterError("--plot", path.name, f"a file that ends in {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise ParameterError("--plot", str(path), "in a folder that is there")
    with _writing(path):
        check_writable(path)
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise MissingExtraError("--plot", "matplotlib", "plot") from None


def draw(found: Facts, path: Path) -> bool:
    """Draw the facts of :func:`mlxrun.bench.report.facts` into a file of the format of its name.

    Returns:
        Whether there was anything to draw.
    """
    check(path)
    made = panels(found)
    if not made:
        return False
    import matplotlib

    # The same bytes for the same figures, and letters that stay letters.
    with matplotlib.rc_context({"svg.hashsalt": "mlxrun", "svg.fonttype": "none", "font.size": 9}):
        figure, ending = _figure(made, found), path.suffix.lower()
        with _writing(path), replacing(path, ending, mode=0o644) as partial:
            if ending == ".html":
                partial.write_text(_page(figure, found), encoding="utf-8")
            else:
                figure.savefig(partial, metadata=_UNDATED.get(ending))
    return True


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = "Name another file"
        raise PictureError(f"cannot write {path}: {error.strerror or error}", hint=hint) from error


def panels(found: Facts) -> list[Panel]:
    """The diagrams of some facts: none where nothing was measured."""
    decodes = [one for one in found["results"] if "predict" in one["workload"]]
    prefills = [one for one in found["results"] if set(one["workload"]) == {"prompt", "context"}]
    alone = [one for one in decodes if one["parallel"] == 1]
    limits = _limits(found)
    made = [
        Panel("All sequences together", "sequences", _lines(decodes, "parallel", limits)),
        Panel("Each sequence", "sequences", _lines(decodes, "parallel", {}, each=True)),
        Panel("Decode", "context in tokens", _lines(alone, "context", limits)),
        Panel("Prefill", "context in tokens", _lines(prefills, "context", limits)),
    ]
    if not any(panel.lines for panel in made):  # nothing was varied: a point for each test
        made = [
            Panel("Prefill", "prompt tokens", _lines(prefills, "prompt", limits, least=1)),
            Panel("Decode", "sampled tokens", _lines(decodes, "predict", limits, least=1)),
        ]
    return [panel for panel in made if panel.lines]


def _limits(found: Facts) -> dict[str, float]:
    """Limits of this device by test, where a roofline was measured."""
    tests = (found.get("roofline") or {}).get("tests", [])
    ours = (test for test in tests if test.get("runtime", OURS) == OURS)
    return {test["test"]: test["limit"]["rate"] for test in ours}


def _lines(
    results: Iterable[Facts],
    axis: str,
    limits: dict[str, float],
    *,
    each: bool = False,
    least: int = 2,
) -> list[Line]:
    """A line for all results that differ in one number only, and one for their limits.

    Args:
        axis: name of that number of a workload.
        limits: tokens/s by test.
        each: rates of one sequence, not of all together.
        least: points of a line.
    """
    lines: dict[tuple[str, str], Line] = {}
    limiting: dict[tuple[str, str], Line] = {}
    for one in results:
        key = (one["runtime"], _name(one["workload"], axis))
        rate, across = one["tokens_per_second"], one["workload"][axis]
        shared = one["parallel"] if each else 1
        points = lines.setdefault(key, Line(" ".join(key), {})).points
        points[across] = (rate["median"] / shared, rate["low"] / shared, rate["high"] / shared)
        if one["test"] in limits and one["runtime"] == OURS:
            line = limiting.setdefault(key, Line(f"limit of {key[1]}", {}, " ".join(key)))
            line.points[across] = (limits[one["test"]],) * 3
    return [line for line in (*lines.values(), *limiting.values()) if len(line.points) >= least]


def _name(workload: Facts, axis: str) -> str:
    """The name of a test without the number on the axis."""
    numbers = {"prompt": 0, "predict": 0, "context": 0, "parallel": 1, **workload, axis: 0}
    parts = [("pp", numbers["prompt"]), ("tg", numbers["predict"])]
    name = "".join(f"{kind}{number}" for kind, number in parts if number)
    name = name or ("pp" if "prompt" in workload else "tg")
    if numbers["parallel"] > 1:
        name += f" x{numbers['parallel']}"
    return name + (f" @ d{numbers['context']}" if numbers["context"] else "")


def _figure(made: Sequence[Panel], found: Facts) -> Figure:
    from matplotlib.figure import Figure

    columns = min(2, len(made))
    rows = -(-len(made) // columns)
    size = (_PANEL[0] * columns, _PANEL[1] * rows + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(_plain(Path(found["model"]).name))
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, ax in zip(made, axes, strict=False):
        _draw(panel, ax)
    for ax in axes[len(made) :]:
        ax.set_axis_off()
    figure.supxlabel("\n".join(map(_plain, _about(found))), fontsize=7)
    return figure


def _draw(panel: Panel, ax: Axes) -> None:
    """A line through the medians, bars from the lowest to the highest."""
    colors: dict[str | None, Any] = {}
    for line in panel.lines:
        across = sorted(line.points)
        middle, low, high = zip(*(line.points[x] for x in across), strict=True)
        if line.limit_of:
            color = colors[line.limit_of]
            ax.plot(across, middle, linestyle="--", color=color, label=line.label)
            continue
        down = [m - least for m, least in zip(middle, low, strict=True)]
        up = [most - m for m, most in zip(middle, high, strict=True)]
        bars = (down, up)
        bar = ax.errorbar(across, middle, yerr=bars, marker="o", capsize=3, label=line.label)
        colors[line.label] = bar[0].get_color()
    _scale(panel, ax)
    ax.set(title=panel.title, xlabel=panel.across, ylabel="tokens/s")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7, framealpha=0.6)


def _scale(panel: Panel, ax: Axes) -> None:
    """Logarithmic axes where rates or numbers are far apart, with a tick at each number."""
    values = [point[0] for line in panel.lines for point in line.points.values()]
    if max(values) > _WIDE * min(values):
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=0)
    ticks = sorted({x for line in panel.lines for x in line.points})
    if panel.across != "sequences" and ticks[-1] > 0:
        least = min(x for x in ticks if x)
        ax.set_xscale("symlog", base=2, linthresh=least)
    ax.set_xticks(ticks, [_short(x) for x in ticks])
    ax.minorticks_off()


def _about(found: Facts) -> list[str]:
    machine, use = found["machine"], found["other_use"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    shared = "Other programs used this machine meanwhile."
    return [
        f"{machine['device']} ({machine['processor']}, {machine['cores']} cores), "
        f"{machine['system']}, {machine['date']}",
        f"{versions}; median, lowest and highest of {found['repetitions']} runs",
        *([shared] if use["shared"] else []),
    ]


def _page(figure: Figure, found: Facts) -> str:
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata=_UNDATED[".svg"])
    svg = written.getvalue()
    title = escape(f"mlxrun bench {Path(found['model']).name}")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"{svg[svg.index('<svg') :]}</html>\n"
    )


def _plain(text: str) -> str:
    """Text for matplotlib, whose font has ASCII only and for which $ begins a formula."""
    return text.encode("ascii", "replace").decode().replace("$", r"\$")


def _short(number: int) -> str:
    return f"{number >> 10}k" if number >= 1024 and number % 1024 == 0 else str(number)
