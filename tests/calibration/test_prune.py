from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import wavprune
from wavprune import Calibration, PruneReport
from wavprune.calibration.candidates import Trials
from wavprune.calibration.guard import MAGNITUDE
from wavprune.calibration.run import Run
from wavprune.errors import WavpruneError


class Net(nn.Module):
    """Convolutions of several kinds, batch norms, biases and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 12, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(12)
        self.grouped = nn.Conv2d(12, 12, (3, 5), padding=(1, 2), groups=3, bias=False)
        self.fc = nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu_()
        x = self.norm2(self.pointwise(self.depthwise(x).relu_())).relu_()
        x = x + self.grouped(x)
        logits: torch.Tensor = self.fc(x.mean((2, 3)))
        return logits


def net(kind: Callable[[], nn.Module] = Net, seed: int = 0) -> nn.Module:
    """A network whose batch norms fit its data."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind()
        model.train()
        with torch.no_grad():
            for batch in data():
                model(batch)
    return model.eval()


def data(samples: int = 96, size: int = 8, channels: int = 3) -> list[torch.Tensor]:
    """Inputs that neighbors of depend on each other, in batches."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, channels, size, size, generator=generator)
    smooth = nn.functional.avg_pool2d(x, 3, 1, 1) * 2
    return list(torch.split(smooth, 32))


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    now = model.state_dict()
    assert now.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(now[name], value), name


def prune(model: nn.Module, calibration: Any = None, **settings: Any) -> PruneReport:
    chosen = {"wavelet": "dct", "sparsity": 0.7, "scope": "global", **settings}
    given = data() if calibration is None else calibration
    return wavprune.fast.prune(model, calibration=given, **chosen)


@pytest.fixture(scope="module")
def collected() -> Calibration:
    return wavprune.calibrate(net(), data())


@pytest.mark.parametrize(
    ("level", "scope"),
    [
        *itertools.product(["refit", "select", "full"], ["layer", "global"]),
        ("sequential", "global"),
    ],
)
def test_counts_are_those_of_magnitude_and_the_network_is_closer(level: str, scope: str) -> None:
    dense, plain, pruned = net(), net(), net()
    expected = wavprune.fast.prune(plain, wavelet="dct", sparsity=0.7, scope=scope)
    wavprune.match_batchnorm(plain, dense, data())
    report = prune(pruned, scope=scope, calibration_level=level)
    assert report.kept == expected.kept
    if scope == "layer":
        assert [layer.kept for layer in report] == [layer.kept for layer in expected]
    assert report.decision is not None
    assert report.decision.level == level
    assert MAGNITUDE in report.decision.losses
    x = torch.cat(data())
    with torch.no_grad():
        target = dense(x)
        error, plain_error = ((m(x) - target).square().mean() for m in (pruned, plain))
    assert error < plain_error


def test_masks_hold_what_was_kept_and_the_weights_are_in_them() -> None:
    model = net()
    report = prune(model)
    assert report.masks is not None
    projected = copy.deepcopy(model)
    refs = [wavprune.LayerRef(n, projected.get_parameter(f"{n}.weight")) for n in report.masks]
    from wavprune.engine.projection import project_layers, projection_plan

    plan = projection_plan(refs, wavprune.PruneConfig(wavelet="dct"), list(report.bases.values()))
    project_layers(plan, refs, list(report.masks.values()))
    for ref in refs:
        torch.testing.assert_close(
            ref.weight, model.get_submodule(ref.name).weight, rtol=1e-5, atol=1e-6
        )
    for layer in report:
        mask = report.masks[layer.name]
        ones = sum(int(bin(byte).count("1")) for byte in mask.tolist())
        assert layer.kept <= ones <= layer.kept + 15 * 16
        assert layer.backend == "eager"


def test_a_compressed_file_and_a_pruner_take_the_report(tmp_path: Path) -> None:
    model = net()
    report = prune(model)
    saved = wavprune.checkpoint.save(model, tmp_path / "model.safetensors", report=report)
    assert sum(layer.kept for layer in saved.layers) == report.kept
    restored = net(seed=3)
    restored.load_state_dict(wavprune.checkpoint.load(tmp_path / "model.safetensors"))
    x = data()[0]
    with torch.no_grad():
        torch.testing.assert_close(restored(x), model(x), rtol=1e-3, atol=1e-3)


def test_reports_go_through_json() -> None:
    report = prune(net())
    again = PruneReport.from_json(report.to_json())
    assert again.decision == report.decision
    assert again == report
    assert report.decision is not None
    assert report.decision.chosen in str(report)


def test_collecting_once_gives_the_bits_of_collecting_again(
    collected: Calibration, tmp_path: Path
) -> None:
    collected.save(tmp_path / "calibration.safetensors")
    loaded = Calibration.load(tmp_path / "calibration.safetensors")
    for settings in ({"sparsity": 0.6}, {"wavelet": "identity", "sparsity": 0.8}):
        models = [net() for _ in range(4)]
        reports = [
            prune(model, calibration, **settings)
            for model, calibration in zip(
                models, (collected, collected, loaded, data()), strict=True
            )
        ]
        for model, report in zip(models[1:], reports[1:], strict=True):
            assert report == reports[0]
            assert_same(model, state(models[0]))


def test_progress_is_shown_where_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    prune(net(), progress=True)
    shown = capsys.readouterr().err
    assert "calibrate" in shown
    assert "prune" in shown


def test_another_seed_draws_other_inputs() -> None:
    first, second = prune(net()), prune(net(), seed=1)
    assert first.decision is not None
    assert second.decision is not None
    assert first.decision.losses != second.decision.losses


def test_global_state_is_left_alone() -> None:
    model = net().train()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    prune(model)
    assert torch.equal(torch.rand(3), expected)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("layer", ["stem", "depthwise", "grouped"])
@pytest.mark.parametrize("when", [1, 5, 12, 30])
def test_an_error_leaves_the_model_as_it_was(
    error: type[BaseException], layer: str, when: int
) -> None:
    model = net()
    calls = 0

    def fail(module: nn.Module, args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == when:
            raise error("stop")

    before = state(model)
    handle = model.get_submodule(layer).register_forward_pre_hook(fail)
    with pytest.raises(error, match="stop"):
        prune(model)
    handle.remove()
    assert_same(model, before)
    assert not model.training


def test_an_error_while_writing_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = net()
    before = state(model)
    changes = Run.changes

    def broken(self: Any, chosen: Any) -> Any:
        return [*changes(self, chosen), (model.get_parameter("fc.weight"), torch.zeros(7, 7))]

    monkeypatch.setattr(Run, "changes", broken)
    with pytest.raises(RuntimeError):
        prune(model)
    assert_same(model, before)


def test_the_guard_takes_magnitude_where_nothing_is_better(
    collected: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = Trials.losses

    def worse(self: Any, candidate: Any, reference: Any) -> torch.Tensor:
        values = losses(self, candidate, reference)
        first = not hasattr(self, "seen")
        self.seen = True
        return values if first else values + 10

    monkeypatch.setattr(Trials, "losses", worse)
    model, plain = net(), net()
    report = prune(model, collected)
    expected = wavprune.fast.prune(plain, wavelet="dct", sparsity=0.7, scope="global")
    assert report.decision is not None
    assert report.decision.chosen == MAGNITUDE
    assert [layer.kept for layer in report] == [layer.kept for layer in expected]
    for name in ("stem", "depthwise", "pointwise", "grouped"):
        pair = [m.get_parameter(f"{name}.weight") for m in (model, plain)]
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-6)


def test_few_inputs_are_enough_for_a_choice() -> None:
    report = prune(net(), data(20))
    assert report.decision is not None
    assert report.decision.probed == 0
    assert report.decision.fitted == 15
    assert report.decision.compared == 20


def test_auto_chooses_a_basis_for_each_layer(collected: Calibration) -> None:
    report = prune(net(), collected, wavelet="auto")
    assert report["pointwise"].wavelet == "identity"
    assert report["stem"].runner_up is not None
    assert {layer.wavelet for layer in report} <= {"identity", "uhaar", "dct"}


def test_what_is_never_called_is_pruned_by_magnitude() -> None:
    class Spare(Net):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Conv2d(4, 4, 3)

    model, plain = net(Spare), net(Spare)
    report = prune(model)
    wavprune.fast.prune(plain, wavelet="dct", sparsity=0.7, scope="global")
    assert report.decision is not None
    assert report.decision.by_magnitude == ("spare",)
    pair = [m.get_parameter("spare.weight") for m in (model, plain)]
    torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-6)


def test_what_is_called_twice_has_one_mask() -> None:
    class Twice(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(self.stem(x)).relu()
            x = self.depthwise(self.depthwise(x).relu())
            logits: torch.Tensor = self.fc(self.pointwise(x).mean((2, 3)))
            return logits

    model = net(Twice)
    report = prune(model)
    assert report.decision is not None
    assert report.decision.by_magnitude == ("grouped",)
    # Its bias would be shifted for one call and not for the other.
    assert "depthwise" not in report.decision.biases
    with torch.no_grad():
        assert bool(torch.isfinite(model(data()[0])).all())


def test_biases_and_batch_norms_follow(collected: Calibration) -> None:
    dense, model = net(), net()
    report = prune(model, collected, calibration_level="sequential")
    assert report.decision is not None
    assert report.decision.biases == ("depthwise",)
    assert set(report.decision.norms) == {"norm", "norm2"}
    x = torch.cat(collected.statistics)
    means = []
    for m in (dense, model):
        found: list[torch.Tensor] = []
        handle = m.get_submodule("depthwise").register_forward_hook(
            lambda module, args, out, found=found: found.append(out.detach().clone())
        )
        with torch.no_grad():
            m(x)
        handle.remove()
        means.append(found[0].mean((0, 2, 3)))
    torch.testing.assert_close(*means, rtol=1e-4, atol=1e-4)


def test_images_as_outputs_are_compared_by_relative_error() -> None:
    def restorer() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, padding="same"),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(8, 3, 2, stride=2),
        )

    model = net(restorer)
    report = prune(model, sparsity=0.5)
    assert report.decision is not None
    assert report.decision.measure == "relative error"
    assert report.decision.chosen != MAGNITUDE
    assert report.decision.biases == ("0", "2", "4")


def test_inputs_of_several_sizes_are_run_one_by_one() -> None:
    mixed = [batch[:8, :, :size, :size] for batch, size in zip(data(), (8, 7, 6), strict=True)]
    model = net()
    report = prune(model, mixed)
    assert report.decision is not None
    assert report.decision.norms
    assert not any("sequential" in name for name in report.decision.losses)


@pytest.mark.parametrize(
    "batches",
    [
        [(batch, torch.zeros(len(batch))) for batch in data()],
        [{"pixel_values": batch} for batch in data()],
    ],
    ids=["tuples", "mappings"],
)
def test_labels_are_not_looked_at(batches: list[Any], collected: Calibration) -> None:
    assert prune(net(), batches) == prune(net(), collected)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: model.to(memory_format=torch.channels_last),
    ],
    ids=["parallel", "compiled", "channels_last"],
)
def test_wrapped_models_are_pruned_like_the_model(wrap: Callable[[nn.Module], Any]) -> None:
    plain, wrapped = net(), net()
    expected = prune(plain)
    report = prune(wrap(wrapped))
    assert report.kept == expected.kept
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(wrapped.get_parameter(name), weight, rtol=1e-3, atol=1e-3)


def test_half_precision_stays_half_precision() -> None:
    model = net().to(torch.bfloat16)
    report = prune(model, [batch.bfloat16() for batch in data()])
    assert model.get_parameter("stem.weight").dtype == torch.bfloat16
    assert report.decision is not None
    assert report.decision.chosen != MAGNITUDE
    with torch.no_grad():
        assert bool(torch.isfinite(model(data()[0].bfloat16())).all())


def test_blocks_are_reported() -> None:
    model = net()
    calibration = wavprune.calibrate(model, data(), max_memory=60_000)
    report = prune(model, calibration)
    assert report.decision is not None
    assert report.decision.block_diagonal
    assert report.sparsity == pytest.approx(0.7, abs=1e-3)


def test_linear_layers_are_solved_in_the_identity() -> None:
    targets = ["stem", "fc"]
    dense, model = net(), net()
    report = prune(model, targets=targets, method="min_weight")
    assert [layer.wavelet for layer in report] == ["identity", "identity"]
    assert int((model.get_parameter("fc.weight") != 0).sum()) == report["fc"].kept
    assert prune(net(), targets=targets, wavelet="auto")["fc"].wavelet == "identity"
    before = state(dense)
    with pytest.raises(WavpruneError, match=r"layer 'fc': its weight has kernels of 6x12 in the"):
        prune(dense, targets=targets)
    assert_same(dense, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "random"}, "calibration does not go with method='random'"),
        ({"backend": "reference"}, "backend='reference' does not prune from calibration data"),
        ({"percentile": 50.0, "sparsity": None, "scope": "layer"}, "percentile=50.0 ranks"),
        ({"calibration_level": "best"}, "unknown calibration_level 'best'; allowed: refit"),
        ({"match": "report", "sparsity": None, "method": "min_weight"}, "match and calibration"),
        ({"calibration": []}, "loader is empty"),
        ({"calibration": [torch.full((4, 3, 8, 8), torch.nan)]}, "NaN or infinite"),
    ],
    ids=["random", "backend", "percentile", "level", "match", "empty", "nan"],
)
def test_bad_input_is_said_before_anything_changes(settings: dict[str, Any], message: str) -> None:
    model = net()
    before = state(model)
    with pytest.raises(WavpruneError, match=message):
        prune(model, **settings)
    assert_same(model, before)


def test_an_iterator_is_refused() -> None:
    with pytest.raises(TypeError, match="calibration is a list_iterator, which can be read only"):
        prune(net(), iter(data()))


def test_a_calibration_of_other_weights_or_layers_is_refused(collected: Calibration) -> None:
    with pytest.raises(WavpruneError, match="the weight of layer 'stem' is not the one"):
        prune(net(seed=9), collected)
    with pytest.raises(WavpruneError, match="nothing of layer 'fc'; it has stem, depthwise"):
        prune(net(), collected, targets=["fc"], wavelet="identity")


def test_another_file_is_no_calibration(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(WavpruneError, match="this is no calibration"):
        Calibration.load(tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("no")
    with pytest.raises(WavpruneError, match="this is no calibration"):
        Calibration.load(tmp_path / "text")
