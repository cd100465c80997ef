"""The API does what its own document says, for whatever is sent."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings

from tests.support.service import upload

schemathesis = pytest.importorskip("schemathesis")
checks = pytest.importorskip("schemathesis.specs.openapi.checks")
pytestmark = pytest.mark.waits

# Streams of events end with a job, and uploads of noise are refused by their suffix.
LEFT_OUT = r"/(events|models|inputs)$"
EXAMPLES = 5


@pytest.fixture(scope="module")
def document(address: str) -> Any:
    return schemathesis.openapi.from_url(f"{address}/api/v1/openapi.json")


@pytest.fixture(scope="module")
def known(client: httpx.Client, demo: Any) -> dict[str, str]:
    """A model and a job that are there, so that requests get past their ids."""
    model = upload(client, demo)["id"]
    job = client.post(f"/api/v1/models/{model}/jobs", json={"kind": "prune"}).json()["id"]
    return {"model": model, "job": job}


def operations(document: Any) -> list[Any]:
    found = [result.ok() for result in document.get_all_operations()]
    return [
        operation
        for operation in found
        if operation.method.upper() != "DELETE" and not re.search(LEFT_OUT, operation.path)
    ]


def test_every_answer_is_as_documented(document: Any, known: dict[str, str]) -> None:
    # Which bases a model has, and what goes together, no schema says.
    accepted = checks.positive_data_acceptance
    chosen = operations(document)
    assert len(chosen) >= 12
    for operation in chosen:

        @given(case=operation.as_strategy())
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        )
        def check(case: Any) -> None:
            case.path_parameters = {name: known[name] for name in case.path_parameters or {}}
            case.call_and_validate(excluded_checks=[accepted])

        check()
