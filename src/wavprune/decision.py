"""What a run with calibration data chose, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Decision:
    """The candidates of a calibrated run, as they were compared.

    Attributes:
        level: ``"refit"``, ``"select"``, ``"sequential"`` or ``"full"``: what was tried.
        chosen: the candidate that was taken.
        reason: why.
        measure: ``"kl"``, of the logits, or ``"relative error"`` of the outputs, squared; both
            against the unpruned network, in the mean over the inputs of ``compared``.
        losses: of each candidate, in that measure.
        errors: the standard error of the difference of each candidate to magnitude.
        solved_on_all: True where the chosen candidate was solved once more on all inputs; its loss
            on ``compared`` did not rise.
        fitted: how many inputs the statistics are of.
        probed: how many inputs single layers were tried on.
        compared: how many inputs the candidates were compared on.
        ridges: of each layer.
        by_magnitude: layers that the network never called: they were pruned by magnitude.
        block_diagonal: into how many blocks the matrices of layers were cut that did not fit.
        norms: batch norms whose running statistics changed.
        biases: layers whose bias changed.
        notes: what else there is to say.
    """

    level: str
    chosen: str
    reason: str
    measure: str
    losses: Mapping[str, float]
    errors: Mapping[str, float]
    solved_on_all: bool
    fitted: int
    probed: int
    compared: int
    ridges: Mapping[str, float] = field(default_factory=dict)
    by_magnitude: tuple[str, ...] = ()
    block_diagonal: Mapping[str, int] = field(default_factory=dict)
    norms: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Decision:
        """What ``to_dict`` gave; unknown entries are left out."""
        known = {entry.name for entry in dataclasses.fields(cls)} & values.keys()
        lists = ("by_magnitude", "norms", "biases", "notes")
        entries: dict[str, Any] = {k: values[k] for k in known}
        for name in known & set(lists):
            entries[name] = tuple(entries[name])
        return cls(**entries)

    def to_dict(self) -> dict[str, Any]:
        """Names and values, ready for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """A line for each candidate, and what was changed beside the weights."""
        lines = [
            f"calibration: {self.chosen} ({self.reason}); statistics of {self.fitted} inputs, "
            f"probes of {self.probed}, {self.measure} on {self.compared} others:"
        ]
        lines += [
            f"  {'*' if name == self.chosen else ' '} {name}: {loss:.4g}"
            for name, loss in self.losses.items()
        ]
        changed = f"{len(self.norms)} batch norms and {len(self.biases)} biases"
        if self.solved_on_all:
            lines.append("  solved once more on all inputs")
        lines.append(f"  changed beside the weights: {changed}")
        if self.by_magnitude:
            lines.append(f"  never called, by magnitude: {', '.join(self.by_magnitude)}")
        if self.block_diagonal:
            cut = ", ".join(f"{name} ({count})" for name, count in self.block_diagonal.items())
            lines.append(f"  second moments in blocks: {cut}")
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)
