"""How much of a model a run pruned, what it left alone and why, and what a file of it holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .errors import WavpruneError

# Skipped layers that a sentence names.
MOST_NAMED = 8
NOT_SELECTED = "not selected"


class Skipped(NamedTuple):
    """A layer that was left alone.

    Attributes:
        name: of the layer.
        kind: its class, or what a file tells of it.
        reason: why.
    """

    name: str
    kind: str
    reason: str = NOT_SELECTED


@dataclass(frozen=True, slots=True)
class Coverage:
    """The share of a model that was pruned at all; printed, it is a sentence.

    Attributes:
        pruned: weights in the layers that were pruned.
        parameters: all parameters of the model, or elements of all tensors of a file.
        bytes: what all tensors take in an ordinary file, each memory once.
        other_bytes: of these, what is no pruned weight.
        tensors: how many tensors there are.
        skipped: layers with weights that were left alone.

    Example:
        >>> print(Coverage(864, 117_412, 469_648, 466_192, 9, (Skipped("fc", "Linear"),)))
        pruned 864 of 117,412 parameters (0.7%); skipped: fc Linear (not selected)
    """

    pruned: int
    parameters: int
    bytes: int
    other_bytes: int
    tensors: int
    skipped: tuple[Skipped, ...] = ()

    @classmethod
    def of_tensors(
        cls,
        sizes: Sequence[tuple[int, int]],
        pruned: Sequence[tuple[int, int]],
        left: Mapping[str, int],
        reasons: Mapping[str, str],
    ) -> Coverage:
        """That of a file or a graph.

        Args:
            sizes: elements and bytes of every tensor, each memory once.
            pruned: those of the weights that were pruned.
            left: axes of each other weight, by its layer.
            reasons: of the layers that cannot be pruned.
        """
        stored = sum(size for _, size in sizes)
        skipped = [Skipped(name, f"{axes}-D") for name, axes in left.items()]
        return cls(
            pruned=sum(count for count, _ in pruned),
            parameters=sum(count for count, _ in sizes),
            bytes=stored,
            other_bytes=stored - sum(size for _, size in pruned),
            tensors=len(sizes),
            skipped=(*skipped, *(Skipped(name, "", reason) for name, reason in reasons.items())),
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Coverage:
        """What ``to_dict`` gave.

        Raises:
            WavpruneError: it is something else.
        """
        names = [field.name for field in dataclasses.fields(cls)[:-1]]
        numbers: dict[str, Any] = {name: values.get(name) for name in names}
        skipped = values.get("skipped")
        if not all(type(number) is int and number >= 0 for number in numbers.values()):
            raise WavpruneError(f"coverage has {numbers}; allowed: integers from 0")
        if not isinstance(skipped, list) or not all(
            isinstance(entry, list) and len(entry) == 3 and all(isinstance(e, str) for e in entry)
            for entry in skipped
        ):
            raise WavpruneError(
                "coverage does not say of each skipped layer its name, kind, reason"
            )
        return cls(**numbers, skipped=tuple(Skipped(*entry) for entry in skipped))

    def to_dict(self) -> dict[str, Any]:
        """Names and values, ready for JSON."""
        return dataclasses.asdict(self) | {"skipped": [list(entry) for entry in self.skipped]}

    @property
    def share(self) -> float:
        """``pruned / parameters``."""
        return self.pruned / self.parameters if self.parameters else 0.0

    def __str__(self) -> str:
        text = f"pruned {self.pruned:,} of {self.parameters:,} parameters ({self.share:.1%})"
        by_reason: dict[str, list[str]] = {}
        for name, kind, reason in self.skipped[:MOST_NAMED]:
            by_reason.setdefault(reason, []).append(f"{name} {kind}".strip())
        parts = [f"{', '.join(names)} ({reason})" for reason, names in by_reason.items()]
        more = len(self.skipped) - MOST_NAMED
        if parts:
            text += f"; skipped: {'; '.join(parts)}{f' and {more} more' if more > 0 else ''}"
        return text
