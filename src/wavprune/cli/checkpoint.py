"""``wavprune compress``, ``decompress`` and ``portable``."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from torch import nn

from ..checkpoint.coders import CODERS
from ..checkpoint.formats import ONNX
from ..checkpoint.formats.names import SkippedLayerWarning, describe_skipped
from ..checkpoint.quantisers import AUTO, BATCH_NORMS, BITS, TRELLIS
from ..checkpoint.records import FLOATS
from ..checkpoint.report import SaveReport
from ..config import PruneConfig
from ..errors import WavpruneError
from .calibration import Inputs, calibration_options
from .networks import check_factory, load_network
from .options import SOURCE
from .output import check_replaceable, expect_output

OUTPUT = click.option(
    "-o",
    "--output",
    metavar="OUT",
    required=True,
    type=click.Path(path_type=Path),
    help="The .safetensors file to write; of an .onnx model an .onnx file, of a directory another "
    "one.",
)
WITHOUT_CALIBRATION = ", or leave --calibration out: without it the steps follow from the weights"
FORCE = click.option("--force", is_flag=True, help="Replace OUT if it exists; it may be IN itself.")


@click.command()
@SOURCE
@OUTPUT
@click.option(
    "--sparsity", type=float, help="Prune this fraction, in [0, 1), before.  [default: none]"
)
@click.option(
    "--wavelet",
    metavar="NAME",
    default="auto",
    help="A discrete wavelet of PyWavelets, or uhaar, dct, klt, identity, auto.",
)
@click.option(
    "--targets",
    metavar="PATTERN",
    multiple=True,
    help="Compress these layers: a name, a glob or re:...; can be repeated.  "
    "[default: every convolution]",
)
@click.option(
    "--ignore",
    metavar="PATTERN",
    multiple=True,
    help="Leave these layers out: a name, a glob or re:...; can be repeated.",
)
@click.option(
    "--bits", type=click.Choice(tuple(map(str, BITS))), help="Bits of a value.  [default: 8]"
)
@click.option("--values", type=click.Choice(tuple(FLOATS)), help="Instead of --bits.")
@click.option("--step", type=float, help="Instead of --bits: the step over each weight's norm.")
@click.option("--target-bytes", type=int, help="Instead of --bits: how large the file becomes.")
@click.option(
    "--target-bits-per-weight", type=float, help="Instead of --bits: the same, by the weights."
)
@click.option(
    "--coder",
    type=click.Choice((AUTO, *CODERS, TRELLIS)),
    default=AUTO,
    help="What codes the values.",
)
@calibration_options(levels=False)
@click.option(
    "--model",
    "factory",
    metavar="FACTORY",
    help="With --calibration: package.module:function that returns the network whose weights IN "
    "has; a Hugging Face directory, and IN that is such a function itself, need none.",
)
@click.option(
    "--held-out",
    metavar="INPUTS",
    help="With --calibration: inputs to measure on, likewise.  [default: a quarter of the former]",
)
@click.option("--target-kl", type=float, help="With --calibration: the divergence of the outputs.")
@click.option(
    "--batchnorm",
    type=click.Choice(BATCH_NORMS),
    help="With --calibration: fold batch norms, or keep them fine-tunable.  [default: fold]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@FORCE
def compress(
    source: Path,
    output: Path,
    sparsity: float | None,
    wavelet: str,
    targets: tuple[str, ...],
    ignore: tuple[str, ...],
    bits: str | None,
    values: str | None,
    step: float | None,
    target_bytes: int | None,
    target_bits_per_weight: float | None,
    coder: str,
    inputs: Inputs | None,
    factory: str | None,
    held_out: str | None,
    target_kl: float | None,
    batchnorm: str | None,
    as_json: bool,
    force: bool,
) -> None:
    """Store the weights of a checkpoint in few bytes.

    With --calibration, the steps follow from what errors do to the outputs of the network, and the
    file is a third smaller at the same outputs.

    IN is what `wavprune prune` takes; of several shards, OUT is one file. Of a model directory, OUT
    may be a directory, which wavprune.from_pretrained loads. Without --sparsity nothing is pruned
    but what is rounded to 0; what `wavprune prune` pruned stays so, as the metadata of IN say it.

    Of an .onnx model, OUT is the .onnx file of a graph without weights; these are beside it, in a
    .safetensors file of the same name. `wavprune.onnx.session(OUT)` runs both in onnxruntime.
    """
    store = _store(source, output, force)
    model: Path | nn.Module = source
    held = None
    if held_out is not None:
        if inputs is None:
            raise click.UsageError("--held-out goes with --calibration.")
        held = inputs._replace(source=held_out)
    is_graph = _is_graph(source)
    place = source if is_graph else None
    metadata = None
    check_factory(source, factory)
    if inputs is not None and not is_graph:
        model, place, metadata = load_network(source, factory, "--calibration", WITHOUT_CALIBRATION)
    elif factory is not None:
        raise WavpruneError(f"--model {factory} without --calibration: nothing runs the network")
    config = None
    if sparsity is not None:
        config = PruneConfig(
            wavelet=wavelet, sparsity=sparsity, targets=targets or None, ignore=ignore or None
        )
    how: dict[str, Any] = {
        "config": config,
        "wavelet": None if config else wavelet,
        "targets": None if config else targets or None,
        "ignore": None if config else ignore or None,
        "bits": None if bits is None else int(bits),
        "values": values,
        "step": step,
        "target_bytes": target_bytes,
        "target_bits_per_weight": target_bits_per_weight,
        "coder": coder,
        "calibration": None if inputs is None else inputs.load(place),
        "held_out": None if held is None else held.load(place),
        "target_kl": target_kl,
        "batchnorm": batchnorm,
        "progress": sys.stderr.isatty(),
    }
    if metadata is not None:
        how["metadata"] = metadata
    with warnings.catch_warnings():
        # They are in the report.
        warnings.simplefilter("ignore", SkippedLayerWarning)
        saved = store(model, output, **how)
    facts = _facts(saved)
    if is_graph:
        facts |= {"graph": str(output), "graph_bytes": output.stat().st_size}
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    click.echo(_summary(saved))
    if is_graph:
        click.echo(f"graph: {output}, {output.stat().st_size:,} bytes")


def _store(source: Path, output: Path, force: bool) -> Callable[..., SaveReport]:
    """What stores this kind of model, once nothing stands in the way of its output."""
    from ..checkpoint.huggingface import check_directories, save_directory
    from ..checkpoint.saving import output_path, save
    from ..onnx.stored import paths_of
    from ..onnx.stored import save as save_graph

    check_replaceable(output, force)
    expect_output(output)
    if _is_graph(source):
        _, weights = paths_of(output)
        check_replaceable(weights, force)
        expect_output(weights)
        return save_graph
    if source.is_dir() and output.suffix.lower() != ".safetensors":
        check_directories(source, output, force)

        def stored(model: Path | nn.Module, target: Path, **how: Any) -> SaveReport:
            return save_directory(source, target, model=model, force=force, **how)

        return stored
    output_path("OUT", output)
    return save


def _is_graph(source: Path) -> bool:
    return source.suffix.lower() in ONNX


@click.command()
@SOURCE
@OUTPUT
@click.option("--max-bytes", type=int, help="Refuse a file that says its tensors have more.")
@FORCE
def decompress(source: Path, output: Path, max_bytes: int | None, force: bool) -> None:
    """Write what `wavprune compress` stored as an ordinary file: safetensors, or an .onnx model."""
    from ..checkpoint.huggingface import compressed_weights
    from ..checkpoint.loading import decompress as run
    from ..checkpoint.saving import output_path
    from ..onnx.stored import decompress as run_graph

    is_graph = _is_graph(source)
    if not is_graph:
        output_path("OUT", output)
    check_replaceable(output, force)
    expect_output(output)
    if is_graph:
        size = run_graph(source, output, max_bytes=max_bytes)
    else:
        size = run(compressed_weights(source) or source, output, max_bytes=max_bytes)
    click.echo(f"decompressed: {output}, {size:,} bytes")


@click.command()
@SOURCE
@OUTPUT
@click.option("--max-bytes", type=int, help="Refuse a file that says its tensors have more.")
@FORCE
def portable(source: Path, output: Path, max_bytes: int | None, force: bool) -> None:
    """Write a packed file so that it is read without Zstandard.

    IN is what `wavprune compress` wrote with --coder trellis or --calibration. OUT decodes to the
    same weights, here and by the decoder in C of csrc/decoder.
    """
    from ..checkpoint.portable_file import portable as run

    check_replaceable(output, force)
    expect_output(output)
    size = run(source, output, max_bytes=max_bytes)
    click.echo(f"portable: {output}, {size:,} bytes")


def _facts(saved: SaveReport) -> dict[str, object]:
    return {
        "path": str(saved.path),
        "bytes": saved.bytes,
        "uncompressed": saved.uncompressed,
        "layers": len(saved.layers),
        "weights": saved.numel,
        "times_smaller": saved.times_smaller,
        "bits_per_weight": saved.bits_per_weight,
        "bits_per_coded_weight": saved.bits_per_coded_weight,
        "relative_error": saved.relative_error,
        "step": saved.step,
        "predicted_kl": saved.predicted_kl,
        "measured_kl": saved.measured_kl,
        "seconds": saved.seconds,
        "skipped": saved.skipped,
        "left_out": saved.left_out,
    }


def _summary(saved: SaveReport) -> str:
    lines = [
        f"compressed: {saved.path}, {saved.bytes:,} of {saved.uncompressed:,} bytes: "
        f"{saved.times_smaller:.1f} times smaller, {saved.bits_per_weight:.2f} bits per weight",
        f"{len(saved.layers)} layers at {saved.bits_per_coded_weight:.2f} bits for each of their "
        f"weights, relative error {saved.relative_error:.4f}",
    ]
    if saved.measured_kl is not None:
        lines.append(
            f"divergence of the outputs on inputs held back: {saved.measured_kl:.4g}, predicted "
            f"{saved.predicted_kl:.4g}"
        )
    if saved.skipped:
        lines.append(f"stored as they are: {describe_skipped(saved.skipped)}")
    if saved.left_out:
        lines.append(f"not in the file: {', '.join(saved.left_out)}")
    return "\n".join(lines)
