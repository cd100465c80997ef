"""What a run did: one row a layer, and the totals."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .bases import Basis
from .common.atomic import replaced
from .common.optional import require
from .common.tables import SHORT_ROWS, as_html, as_text
from .common.text import csv_cell
from .config import RULES, RunSettings
from .coverage import Coverage
from .decision import Decision
from .errors import WavpruneError
from .estimate import BITS, PER_FILE, PER_TENSOR, layer_bytes
from .report_table import report_table

if TYPE_CHECKING:
    import torch
    from pandas import DataFrame
    from rich.table import Table


@dataclass(frozen=True, slots=True)
class LayerStats:
    """One layer.

    Attributes:
        name: the layer's name in its model.
        shape: the weight's own: ``(Cout, Cin/groups, kh, kw)``, ``(out, in)`` or likewise.
        method: ``"dwt"``, ``"min_weight"`` or ``"random"``.
        wavelet: the basis that ran; ``"identity"`` for 1x1 kernels whatever was asked for.
        mode: PyWavelets' boundary mode; None where the basis has no boundary.
        level_requested: the level asked for; None means the deepest that exists.
        level_used: the level that ran; 0 means that no transform ran.
        backend: which backend ran.
        device: where it ran.
        threshold: coefficients that ranked below it were pruned (importance for ``sparsity``,
            magnitude for ``percentile``, a uniform draw in (0, 1) for ``"random"``).
        coefficients: how many coefficients the layer has, structural zeros not counted.
        kept: coefficients that were not pruned: the values that a file must store.
        sparsity: ``1 - kept / numel(weight)``.
        weight_zeros: exact zeros in the weight afterwards.
        weight_sparsity: ``weight_zeros / numel(weight)``.
        relative_error: Frobenius norm of the change over that of the weight; 0 for a zero weight.
        seconds: wall time; layers that ran together share it by their number of weights.
        runner_up: with ``wavelet="auto"``, the basis that came second; else None.
        runner_up_error: its relative error at the kept count at which the two were compared.
    """

    name: str
    shape: tuple[int, ...]
    method: str
    wavelet: str
    mode: str | None
    level_requested: int | None
    level_used: int
    backend: str
    device: str
    threshold: float
    coefficients: int
    kept: int
    sparsity: float
    weight_zeros: int
    weight_sparsity: float
    relative_error: float
    seconds: float
    runner_up: str | None = None
    runner_up_error: float | None = None

    @property
    def numel(self) -> int:
        """How many weights the layer has."""
        return math.prod(self.shape)

    @property
    def note(self) -> str:
        """What came second, or why no transform ran where one was asked for, or nothing."""
        if self.runner_up is not None:
            return f"runner-up {self.runner_up}: {self.runner_up_error:.4f}"
        if self.method != "dwt" or self.level_used > 0 or self.numel == 0:
            return ""
        if len(self.shape) > 2 and math.prod(self.shape[2:]) == 1:
            return "1x1: no spatial axis"
        return "" if self.wavelet == "identity" else "level 0: no transform ran"


FIELDS = tuple(field.name for field in dataclasses.fields(LayerStats))


class Outcome(NamedTuple):
    """What a run did.

    Attributes:
        layers: one entry per layer.
        squared_norm: squared Frobenius norm of all weights before.
        squared_error: squared Frobenius norm of the whole change.
    """

    layers: tuple[LayerStats, ...]
    squared_norm: float
    squared_error: float


class PruneReport:
    """All layers of one run, in the model's order, with totals.

    Iterating gives the ``LayerStats``; printed, and in a notebook, it is a table. Of weights on a
    GPU the numbers stay there until the first of them is asked for, or ``wait()`` is called.

    Two reports are equal if they say the same of the same settings, whatever time it took.

    Args:
        outcome: what the run did, or a function that fetches it once it is asked for.
        settings: the settings of the run.
        bases: the basis that each layer was pruned in, by the layer's name.
        masks: which coefficients of each layer were kept, packed as ``wavprune.backends.masks``
            says, where a run was asked for them.
        decision: what a run with calibration data chose.
        coverage: what share of the model that was.

    Attributes:
        settings: the settings of the run.
        bases: the basis of each layer; empty for a report that was read from JSON.
        masks: the masks of the layers, or None.
        decision: what was chosen from calibration data, and what changed beside the weights; None
            for a run without.
        coverage: the share of the model that was pruned, and what was skipped; None for a report
            that an earlier version wrote.
    """

    def __init__(
        self,
        outcome: Outcome | Callable[[], Outcome],
        settings: RunSettings,
        bases: Mapping[str, Basis] | None = None,
        masks: Mapping[str, torch.Tensor] | None = None,
        decision: Decision | None = None,
        coverage: Coverage | None = None,
    ) -> None:
        self._outcome = outcome
        self.settings = settings
        self.bases = dict(bases or {})
        self.masks = None if masks is None else dict(masks)
        self.decision = decision
        self.coverage = coverage

    @classmethod
    def from_json(cls, text: str) -> PruneReport:
        """The report that ``to_json`` wrote.

        Raises:
            WavpruneError: the text is something else.
        """
        try:
            content = json.loads(text)
            sums = (content["squared_norm"], content["squared_error"])
            layers = tuple(_layer_from(row) for row in content["layers"])
            settings = RunSettings.from_dict(content["settings"])
            known = content.get("decision")
            decision = None if known is None else Decision.from_dict(known)
            covered = content.get("coverage")
            coverage = None if covered is None else Coverage.from_dict(covered)
        except (KeyError, TypeError, ValueError) as error:
            raise WavpruneError(
                f"this is not what PruneReport.to_json() writes: {error}"
            ) from error
        return cls(Outcome(layers, *sums), settings, decision=decision, coverage=coverage)

    def wait(self) -> PruneReport:
        """Wait until the numbers are here; the report itself.

        Raises:
            WavpruneError: a weight on a GPU was not finite; no weight has changed then.
        """
        self._read()
        return self

    def _read(self) -> Outcome:
        if not isinstance(self._outcome, Outcome):
            self._outcome = self._outcome()
        return self._outcome

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold the numbers, wherever they were."""
        self._read()
        return self.__dict__

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PruneReport):
            return NotImplemented
        return self._comparable() == other._comparable()

    __hash__ = None  # type: ignore[assignment]  # equal by value

    def _comparable(self) -> tuple[object, ...]:
        rows = [_finite(dataclasses.asdict(layer) | {"seconds": 0.0}) for layer in self.layers]
        sums = self.squared_norm, self.squared_error
        return rows, sums, self.settings, self.decision, self.coverage

    @property
    def layers(self) -> tuple[LayerStats, ...]:
        """One entry a layer."""
        return self._read().layers

    @property
    def squared_norm(self) -> float:
        """Squared Frobenius norm of all weights before."""
        return self._read().squared_norm

    @property
    def squared_error(self) -> float:
        """Squared Frobenius norm of the whole change."""
        return self._read().squared_error

    def __iter__(self) -> Iterator[LayerStats]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> LayerStats:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    @property
    def numel(self) -> int:
        """Weights in all layers."""
        return sum(layer.numel for layer in self.layers)

    @property
    def kept(self) -> int:
        """Coefficients kept in all layers."""
        return sum(layer.kept for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """``1 - kept / numel`` over all layers."""
        return _pruned_fraction(self.kept, self.numel)

    @property
    def weight_zeros(self) -> int:
        """Exact zeros in all weights afterwards."""
        return sum(layer.weight_zeros for layer in self.layers)

    @property
    def weight_sparsity(self) -> float:
        """``weight_zeros / numel`` over all layers."""
        return self.weight_zeros / self.numel if self.numel else 0.0

    @property
    def relative_error(self) -> float:
        """Frobenius norm of the change over that of the weights, all layers as one vector."""
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0

    @property
    def seconds(self) -> float:
        """Wall time of all layers."""
        return sum(layer.seconds for layer in self.layers)

    @property
    def dense_bytes(self) -> int | None:
        """What all tensors of the model take in an ordinary file, pruned or not.

        They are counted as they were when it was pruned; None for a report that does not know its
        model.
        """
        return None if self.coverage is None else self.coverage.bytes

    def estimated_bytes(self, bits: int = 8) -> int | None:
        """About how large a compressed file of the pruned model is.

        An estimate from the counts of the report, by the entropy of Laplace variables; it reads no
        weight. ``checkpoint.save`` says what a file really takes.

        Args:
            bits: 8, 6 or 4: of a value.

        Returns:
            Bytes; None for a report that does not know its model.

        Raises:
            WavpruneError: ``bits`` is another number.

        Example:
            >>> import torch, wavprune
            >>> report = wavprune.fast.prune(torch.nn.Conv2d(64, 64, 3), sparsity=0.9)
            >>> report.dense_bytes, report.estimated_bytes() < 10_000
            (147712, True)
        """
        if bits not in BITS:
            raise WavpruneError(f"bits must be one of {', '.join(map(str, BITS))}, not {bits!r}")
        if self.coverage is None:
            return None
        method = self.settings.method
        by_size = method not in RULES or not RULES[method].uses_seed
        total = float(self.coverage.other_bytes) + PER_TENSOR * self.coverage.tensors + PER_FILE
        for layer in self.layers:
            channels = layer.shape[0] if layer.shape else 1
            total += layer_bytes(layer.coefficients, layer.kept, channels, bits, by_size)
        return round(total)

    def totals(self) -> dict[str, Any]:
        """The totals by name."""
        names = (
            "numel",
            "kept",
            "sparsity",
            "weight_zeros",
            "weight_sparsity",
            "relative_error",
            "seconds",
        )
        return {name: getattr(self, name) for name in names}

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """One row a layer, with a header; written to ``path`` too, where given."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(FIELDS)
        for layer in self.layers:
            row = dataclasses.asdict(layer)
            row["shape"] = "x".join(map(str, layer.shape))
            writer.writerow(map(csv_cell, row.values()))
        return written(text.getvalue(), path)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Settings, totals and layers as JSON; written to ``path`` too, where given."""
        content: dict[str, Any] = {
            "settings": self.settings.to_dict(),
            "totals": self.totals(),
            "squared_norm": self.squared_norm,
            "squared_error": self.squared_error,
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
        }
        if self.coverage is not None:
            content["coverage"] = self.coverage.to_dict()
            content["dense_bytes"] = self.dense_bytes
            content["estimated_bytes"] = {str(bits): self.estimated_bytes(bits) for bits in BITS}
        if self.decision is not None:
            content["decision"] = self.decision.to_dict()
        return written(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n", path)

    def to_dataframe(self) -> DataFrame:
        """One row a layer, as a pandas DataFrame.

        Raises:
            ImportError: pandas is not installed.
        """
        return data_frame([dataclasses.asdict(layer) for layer in self.layers], FIELDS)

    def to_table(self, max_layers: int | None = None) -> Table:
        """A rich table: the layers and, last, the totals.

        Args:
            max_layers: of more layers than that the table has the first ones and a count of the
                others; None has all.
        """
        return report_table(self, self._title(), self._caption(), max_layers)

    def __repr__(self) -> str:
        longest = max((len(layer.name) for layer in self.layers), default=0)
        return as_text(self.to_table(SHORT_ROWS), 120 + longest)

    def _repr_html_(self) -> str:
        return as_html(self.to_table(SHORT_ROWS))

    def _title(self) -> str:
        settings = self.settings
        if settings.match:
            amount = f"as pruned by {settings.match}"
        elif settings.percentile is not None:
            amount = f"percentile {settings.percentile:g}"
        else:
            amount = f"sparsity {settings.sparsity or 0.0:g}"
        return f"{settings.label}, {amount}, scope {settings.scope}"

    def _caption(self) -> str:
        places = sorted({f"{layer.backend} on {layer.device}" for layer in self.layers})
        lines = [] if self.coverage is None else [f"{self.coverage}.", self._bytes_line()]
        lines.append(
            f"{', '.join(places)}. sparsity: 1 - kept/weights, what a file must store; "
            "weight sp.: exact zeros in the weights."
        )
        if self.decision is not None:
            lines.append(str(self.decision))
        return "\n".join(lines)

    def _bytes_line(self) -> str:
        assert self.coverage is not None
        stored = self.coverage.bytes
        sizes = []
        for bits in BITS:
            size = self.estimated_bytes(bits) or 1
            sizes.append(f"{size:,} at {bits} bits ({stored / size:.1f} times smaller)")
        return f"{stored:,} bytes as stored now; compressed, about {', '.join(sizes)}."


def _pruned_fraction(kept: int, numel: int) -> float:
    return 1 - kept / numel if numel else 0.0


def _layer_from(row: dict[str, Any]) -> LayerStats:
    threshold = row["threshold"]
    if threshold is None:
        # JSON has no infinity, which is the threshold where nothing is kept.
        threshold = math.nan if row["kept"] else math.inf
    return LayerStats(**{**row, "shape": tuple(row["shape"]), "threshold": threshold})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def data_frame(rows: Sequence[dict[str, Any]], columns: Sequence[str] | None = None) -> DataFrame:
    """The rows as a pandas DataFrame.

    Raises:
        ImportError: pandas is not installed.
    """
    pd = require("pandas", extra="dataframe", purpose="to_dataframe")
    frame: DataFrame = pd.DataFrame(rows, columns=None if columns is None else list(columns))
    return frame


def written(text: str, path: str | os.PathLike[str] | None) -> str:
    """The text, after it was written to a file where one is given."""
    if path is not None:
        with replaced(Path(path)) as new:
            new.write_text(text, encoding="utf-8")
    return text
