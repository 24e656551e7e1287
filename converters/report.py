"""``conversion.json``: every tensor's form and measured error, and totals."""

from __future__ import annotations

import html
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class TensorRecord:
    """The conversion of one tensor.

    Attributes:
        name: in the source.
        target: Hugging Face parameter name.
        type: how the source stores it (GGML type).
        form: how MLX holds it.
        fidelity: ``exact`` (every weight bit-equal in float32), ``rounded`` (the source's own codes
            with rounded scales, or rounded floats), ``requantized`` (new codes) or ``merged`` (with
            an adapter; errors are then against the exact sum).
        rmse: relative root mean square error, measured over all weights; None if not measured.
        max_error: largest absolute error of a weight; None if not measured.
        bits_before, bits_after: stored bits per weight.
        elements: number of weights.
        note: why the form is not the one that the policy promises.
    """

    name: str
    target: str
    type: str
    form: str
    fidelity: str
    rmse: float | None
    max_error: float | None
    bits_before: float
    bits_after: float
    elements: int
    note: str = ""


@dataclass(repr=False)
class ConversionReport:
    """All tensors of a conversion.

    Attributes:
        source: names, sizes in bytes and SHA-256 of the files that were read.
        policy: ``exact``, ``near`` or ``compact``.
        tensors: one record each.
        skipped: ``{"name", "type", "reason"}`` of tensors that have no place in the model.
        files: names of the small files written.
        warnings: obstacles to using the result as it is.
        path: where the checkpoint was written; None when it stayed in memory.
        seconds: how long it took.
    """

    source: dict[str, Any]
    policy: str
    tensors: list[TensorRecord] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    path: str | None = None
    seconds: float = 0.0

    @property
    def elements(self) -> int:
        return sum(t.elements for t in self.tensors)

    @property
    def bits_before(self) -> float:
        """Bits per weight of the source, over all tensors."""
        return sum(t.bits_before * t.elements for t in self.tensors) / max(1, self.elements)

    @property
    def bits_after(self) -> float:
        """Bits per weight of the result, over all tensors."""
        return sum(t.bits_after * t.elements for t in self.tensors) / max(1, self.elements)

    @property
    def nbytes(self) -> int:
        """Size of the converted weights in bytes."""
        return round(self.bits_after * self.elements / 8)

    def fidelity(self) -> dict[str, int]:
        """How many tensors are exact, rounded, requantized and merged."""
        return dict(Counter(t.fidelity for t in self.tensors))

    def notes(self) -> list[str]:
        """A line for each tensor whose form is not the one promised."""
        return [f"{t.name} ({t.type}): {t.note}" for t in self.tensors if t.note]

    def to_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "policy": self.policy,
            "bits_before": self.bits_before,
            "bits_after": self.bits_after,
            "tensors": [asdict(t) for t in self.tensors],
            "skipped": self.skipped,
            "files": self.files,
        }

    def to_json(self) -> str:
        """The text of ``conversion.json``."""
        return json.dumps(self.to_dict(), indent=1)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(each.name)}</td><td>{each.type}</td><td>{each.form}</td>"
            f"<td>{each.fidelity}</td></tr>"
            for each in self.tensors
        )
        head = "<tr><th>tensor</th><th>type</th><th>form</th><th>fidelity</th></tr>"
        return f"<details><summary>{self}</summary><table>{head}{rows}</table></details>"

    def __repr__(self) -> str:
        return f"ConversionReport({self})"

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {kind}" for kind, n in sorted(self.fidelity().items()))
        return (
            f"{len(self.tensors)} tensors ({counts}), {self.bits_before:.2f} -> "
            f"{self.bits_after:.2f} bits per weight, {self.nbytes / 1e6:.1f} MB, "
            f"policy {self.policy}"
        )
