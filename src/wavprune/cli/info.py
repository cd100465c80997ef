"""``wavprune info``."""

from __future__ import annotations

import click
import torch
from rich.table import Table

from .. import backends
from .._version import versions
from .options import JSON
from .output import literal, write_json, write_table


@click.command()
@JSON
def info(as_json: bool) -> None:
    """Show versions, threads, the instruction set, and which backends can run here."""
    reasons = backends.unavailable()
    facts = {
        **versions(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.is_available(),
        **_compiled_facts(available="native" not in reasons),
    }
    if as_json:
        status = {name: reasons.get(name) for name in backends.names()}
        write_json({**facts, "unavailable": status})
        return
    table = Table(show_header=False, title="wavprune", title_justify="left")
    for name, fact in facts.items():
        table.add_row(name, literal(str(fact)))
    table.add_section()
    for name in backends.names():
        table.add_row(f"backend {name}", literal(reasons.get(name, "ready")))
    write_table(table)


def _compiled_facts(available: bool) -> dict[str, str | None]:
    """What the compiled extension was built for; its module cannot be imported without it."""
    if not available:
        return {"instruction set": None, "CUDA kernels": None}
    from ..ops import cuda_architectures, instruction_set

    return {"instruction set": instruction_set(), "CUDA kernels": cuda_architectures()}
