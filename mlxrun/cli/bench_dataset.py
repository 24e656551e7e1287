"""``mlxrun bench --dataset``: the lengths of a data set, and what to measure for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxrun.bench.coverage import INTERACTIVE, OFFLINE, TRIED, Advice, advise, facts, sizes, tried
from mlxrun.bench.dataset import read
from mlxrun.bench.lengths import PERCENTILES, Lengths, Summary, counted
from mlxrun.bench.results import OURS, Results
from mlxrun.bench.workload import Decode, Workload
from mlxrun.cli.console import Bar, Output, Table, table

if TYPE_CHECKING:
    from mlxrun.cli.bench_measure import Measuring
    from mlxrun.llm import LLM
    from mlxrun.memory.plan import MemoryPlan

# Exchanges whose tokens are counted; percentiles of so many are as good as those of all.
MOST = 10_000


class Dataset:
    """A file of prompts and outputs, read before a model is loaded.

    Raises:
        DatasetError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with Bar(f"Reading {path.name}", count="exchanges"):
            self._exchanges, self._count = read(path, MOST)

    def study(
        self, llm: LLM, memory: MemoryPlan, bench: Measuring, counts: Sequence[int] | None = None
    ) -> Study:
        """Count tokens, try some numbers of sequences, and say what to measure.

        Args:
            counts: numbers of sequences to try; the usual ones if none are given.

        Raises:
            DatasetError: the chat template refuses a conversation.
        """
        from mlxrun.cli.bench_measure import affordable

        with Bar("Counting tokens", count="exchanges") as bar:
            lengths = counted(self._path, self._exchanges, llm.tokenizer, bar)
        found = sizes(lengths)
        usual = found[1]
        workloads, _ = affordable(memory, tried(usual, counts or TRIED, llm.context_length))
        bench.run(workloads, "Trying numbers of sequences")
        if bench.ended:  # the best of those that came first says nothing
            workloads = []
        rates = _rates(bench.results, workloads)
        advices = advise(found, rates, memory.parallel_for)
        about = {"file": self._path.name, "exchanges": self._count, "counted": len(self._exchanges)}
        return Study(about, lengths, advices, workloads, llm.context_length)


class Study:
    """What a data set is like, and what to measure for it.

    Args:
        about: the file, and how much of it was counted.
        lengths: of its prompts and outputs.
        advices: for each level.
        tried: workloads that were measured for them; none where that ended early.
        context: of the model, in tokens.
    """

    def __init__(
        self,
        about: Mapping[str, Any],
        lengths: Lengths,
        advices: Sequence[Advice],
        tried: Sequence[Workload],
        context: int,
    ) -> None:
        self._about, self._lengths, self._advices = about, lengths, advices
        self._tried, self._context = tried, context

    def workloads(self, level: str) -> list[Workload]:
        """What to measure for a level."""
        (advice,) = (advice for advice in self._advices if advice.size.level == level)
        return advice.workloads

    def facts(self) -> dict[str, Any]:
        """All of it, as JSON types."""
        return {**self._about, **facts(self._lengths, self._advices)}

    def print(self) -> None:
        """Tables for people."""
        out = Output()
        for made in (self._percentiles(), self._recommended()):
            out.print(made)
            out.print()
        for line in self._notes():
            out.print(line)
        out.print()

    def _percentiles(self) -> Table:
        counted, there = self._about["counted"], self._about["exchanges"]
        some = f"{counted:,} of {there:,}" if counted < there else f"{there:,}"
        title = f"Tokens of {some} exchange{'s' * (there > 1)} in {self._about['file']}"
        rows = []
        for what, lengths in (("prompts", self._lengths.prompts), ("outputs", self._lengths.drawn)):
            found = Summary.of(lengths)
            shares = [found.percentiles[percent] for percent in PERCENTILES]
            rows.append((what, found.count, f"{found.mean:.0f}", *shares, found.longest))
        return table(title, ("", "#count", "#mean", *(f"#{p}%" for p in PERCENTILES), "#max"), rows)

    def _recommended(self) -> Table:
        rows = []
        for advice in self._advices:
            size, workers = advice.size, advice.workers
            chosen = (workers.interactive, workers.offline) if workers else ("", "")
            held = f"{advice.held:,}" if advice.held < 10**6 else "any"
            rows.append(
                (
                    size.level,
                    f"{size.percent}%",
                    size.prompt,
                    size.predict,
                    f"{size.both:.0%}",
                    held,
                    *chosen,
                )
            )
        columns = ("coverage", "#of each", "#n-prompt", "#n-predict", "#of both", "#fit in memory")
        at_once = ("#workers, interactive", "#workers, offline")
        return table("What to measure", (*columns, *at_once), rows)

    def _notes(self) -> list[str]:
        lines = []
        if self._tried:
            counts = ", ".join(str(workload.parallel) for workload in self._tried)
            lines = [
                f"Workers, of {counts}: interactive is the most at which each keeps "
                f"{INTERACTIVE:.0%} of the rate that it has alone, offline the fewest that reach "
                f"{OFFLINE:.0%} of the best rate together."
            ]
        long = [one.size for one in self._advices if one.size.length > self._context]
        if long:
            named = ", ".join(f"{size.level} ({size.length} tokens)" for size in long)
            lines.append(f"Longer than the model's context of {self._context} tokens: {named}.")
        return lines


def _rates(results: Results, workloads: Sequence[Workload]) -> dict[int, float]:
    """Tokens a second by the number of sequences, of what was measured of some workloads."""
    found = [results.find(w, OURS) for w in workloads if isinstance(w, Decode)]
    return {one.workload.parallel: one.rate.median for one in found if one}
