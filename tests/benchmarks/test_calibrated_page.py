"""The page of calibrated pruning says what its rows say."""

from __future__ import annotations

import pandas as pd
from benchmarks.calibrated_page import BEFORE, REVISION, page


def row(network: str, method: str, score: float, kl: float, seed: int = 0) -> dict[str, object]:
    return {
        "network": network,
        "seed": seed,
        "inputs": 100,
        "basis": "dct",
        "method": method,
        "sparsity": 0.9,
        "measure": "top-1 %",
        "kept": 10,
        "score": score,
        "score_se": 0.5,
        "agreement": score,
        "agreement_se": 0.5,
        "kl": kl,
        "kl_se": 0.01,
        "dense": 90.0,
        "seconds": 12.0,
        "collect_seconds": 3.0,
        "threads": 1,
        "peak_mb": 500,
        "chosen": "" if method == "magnitude" else "selected gn",
        "revision": REVISION,
    }


def test_trainings_are_averaged_and_the_untouched_network_is_last() -> None:
    rows = [
        row("a net, untouched", "full", 70.0, 0.5),
        row("a net", "magnitude", 50.0, 1.0),
        row("a net", "full", 80.0, 0.2),
        row("a net", "full", 82.0, 0.4, seed=1),
    ]
    text = page(pd.DataFrame(rows))
    assert "| 90% | dct | magnitude | 50.0 ± 0.5 | 50.0 ± 0.5 | 1.000 ± 0.010 | 12 |  |" in text
    assert (
        "| 90% | dct | full | 81.0 ± 0.5 | 81.0 ± 0.5 | 0.300 ± 0.010 | 12 | selected gn |" in text
    )
    assert "Unpruned: 90.0 top-1 %; 2 training(s)." in text
    assert text.index("## a net, 100 inputs") < text.index("## a net, untouched, 100 inputs")
    assert "| a net | 100 | 3 | 12 | 500 |" in text


def test_scores_without_logits_have_no_kl() -> None:
    rows = pd.DataFrame([row("a net", "full", 30.0, float("nan"))])
    assert "| 90% | dct | full | 30.0 ± 0.5 | 12 | selected gn |" in page(rows)


def test_rows_of_earlier_algorithms_are_marked() -> None:
    old = {**row("a net", "full", 30.0, 0.5), "revision": float("nan")}
    magnitude = {**row("a net", "magnitude", 20.0, 0.9), "revision": float("nan")}
    new = row("other", "full", 40.0, 0.3)
    text = page(pd.DataFrame([old, magnitude, new]))
    assert "| dct | full* | 30.0" in text
    assert "| dct | magnitude | 20.0" in text
    assert "| dct | full | 40.0" in text
    assert BEFORE[2] in text
    assert BEFORE[2] not in page(pd.DataFrame([magnitude, new]))
