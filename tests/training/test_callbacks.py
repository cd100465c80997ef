from __future__ import annotations

import copy
import os
import stat
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from wavprune import PruneConfig, Pruner, PruneReport
from wavprune.bases import basis_for
from wavprune.training.schedules import Cubic

# Short runs on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:finished after step")

SCHEDULE = Cubic(0.2, 0.8, start=1, end=7, every=3)


class Digits(Dataset[dict[str, torch.Tensor]]):
    """Noise with labels, always the same."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(40, 1, 8, 8, generator=generator)
        self.y = torch.randint(0, 4, (40,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[index], "labels": self.y[index]}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(1, 8, 3)
        self.second = nn.Conv2d(8, 8, 3)
        self.last = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.second(self.first(x).relu()).relu().mean((2, 3))
        logits = self.last(hidden)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def check(net: nn.Module, report: PruneReport | None) -> None:
    assert report is not None
    assert report.sparsity == pytest.approx(0.8, abs=0.01)
    for layer in report:
        weight = net.get_submodule(layer.name).weight
        assert isinstance(weight, torch.Tensor)
        kernels = weight.detach().double().flatten(0, 1).flatten(1).numpy()
        sizes = np.abs(kernels @ basis_for(PruneConfig(), weight).analysis.T)
        assert np.count_nonzero(sizes > 1e-6 * sizes.max()) == layer.kept


def same(left: nn.Module, right: nn.Module) -> None:
    for (name, a), b in zip(left.named_parameters(), right.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.filterwarnings("ignore::Warning:lightning", "ignore:The '.*dataloader' does not have")
def test_lightning_trains_a_pruned_network_and_resumes_it(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries that Lightning imports
        from lightning.pytorch import Callback, LightningModule, Trainer

        from wavprune.training.lightning import PruningCallback

    class Module(LightningModule):
        def __init__(self, fail_at: int | None = None, optimizer: bool = True) -> None:
            super().__init__()
            self.net = Net()
            self.fail_at, self.optimizer = fail_at, optimizer

        def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
            if index == self.fail_at:
                raise ZeroDivisionError("the loss")
            loss: torch.Tensor = self.net(**batch)["loss"]
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer | None:
            return torch.optim.Adam(self.parameters(), lr=0.01) if self.optimizer else None

    def trainer_of(epochs: int, *callbacks: Callback) -> Trainer:
        return Trainer(
            max_epochs=epochs,
            callbacks=[*callbacks],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )

    data = DataLoader(Digits(), 8)

    def fitted(epochs: int, resume: str | None = None) -> tuple[Module, Trainer, PruningCallback]:
        module, callback = Module(), PruningCallback(schedule=SCHEDULE)
        trainer = trainer_of(epochs, callback)
        trainer.fit(module, data, ckpt_path=resume, weights_only=True)
        return module, trainer, callback

    whole, _, callback = fitted(2)
    check(whole, callback.report)
    _, trainer, _ = fitted(1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _, again = fitted(2, str(tmp_path / "half.ckpt"))
    check(resumed, again.report)
    same(whole, resumed)

    # The trainer goes on with its steps, and so does the callback; a new trainer begins anew.
    module, trainer, callback = fitted(1)
    assert trainer.fit_loop.max_epochs == 1
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, data)
    check(module, callback.report)
    assert callback.state_dict()["steps"] == 10
    trainer_of(1, callback).fit(Module(), data)
    assert callback.state_dict()["steps"] == 5

    with pytest.raises(ValueError, match="configure_optimizers gave no optimizer"):
        trainer_of(1, PruningCallback()).fit(Module(optimizer=False), data)
    broken, callback = Module(fail_at=2), PruningCallback()
    trainer = trainer_of(1, callback)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(broken, data)
    steps = callback.state_dict()["steps"]
    trainer.optimizers[0].step()
    assert callback.state_dict()["steps"] == steps == 2
    dense = trainer_of(1)
    dense.fit(Module(), data)
    dense.save_checkpoint(tmp_path / "dense.ckpt")
    with pytest.raises(ValueError, match="goes on at step 5, and the checkpoint has no state"):
        fitted(2, str(tmp_path / "dense.ckpt"))


@pytest.mark.filterwarnings("ignore::Warning:transformers", "ignore::Warning:accelerate")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_a_hugging_face_trainer_trains_a_pruned_network_and_resumes_it(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    from wavprune.training.transformers import PruningCallback

    def trained(
        model: nn.Module,
        resume: str | None = None,
        to: Path = tmp_path,
        resume_from: str | None = None,
    ) -> tuple[nn.Module, PruningCallback]:
        callback = PruningCallback(schedule=SCHEDULE, resume_from=resume_from)
        settings: dict[str, Any] = {
            "output_dir": str(to),
            "max_steps": 10,
            "per_device_train_batch_size": 8,
            "save_steps": 4,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "logging_steps": 100,
            "lr_scheduler_type": "constant",
        }
        trainer = Trainer(
            model, TrainingArguments(**settings), train_dataset=Digits(), callbacks=[callback]
        )
        trainer.train(resume_from_checkpoint=resume)
        return model, callback

    net = Net()
    whole, callback = trained(copy.deepcopy(net))
    check(whole, callback.report)
    assert (tmp_path / "checkpoint-4" / "wavprune.safetensors").exists()
    resumed, again = trained(copy.deepcopy(net), str(tmp_path / "checkpoint-4"))
    check(resumed, again.report)
    same(whole, resumed)

    old, new = str(tmp_path / "checkpoint-4"), tmp_path / "elsewhere"
    with pytest.raises(
        ValueError, match=r"elsewhere.checkpoint-4.wavprune.safetensors.*resume_from"
    ):
        trained(copy.deepcopy(net), old, new)
    moved, third = trained(copy.deepcopy(net), old, new, old)
    check(moved, third.report)
    same(whole, moved)


class Awkward(nn.Module):
    """Layers named like entries of the file."""

    def __init__(self) -> None:
        super().__init__()
        self.tensor = nn.Conv2d(3, 4, 3)
        self.mask = nn.Conv2d(4, 4, 3)


@pytest.mark.parametrize("wavelet", ["uhaar", "klt"])
@pytest.mark.parametrize("only", [None, ("tensor",)])
@pytest.mark.filterwarnings("ignore::Warning:transformers")
def test_a_state_is_read_as_it_was_written(
    wavelet: str, only: tuple[str, ...] | None, tmp_path: Path
) -> None:
    from wavprune.training.transformers import _read, _write

    net, config = Awkward(), PruneConfig(wavelet=wavelet, targets=only)
    pruner = Pruner(net, config)
    pruner.attach(torch.optim.SGD(net.parameters(), lr=0.1))
    _write(pruner.state_dict(), tmp_path / "state.safetensors")
    again = Pruner(net, config)
    again.load_state_dict(_read(tmp_path / "state.safetensors"))
    assert again.finish().layers == pruner.finish().layers
    for name, mask in pruner.masks.items():
        assert torch.equal(mask, again.masks[name])


# What other callbacks and libraries do to weights and files.


def lightning() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries that Lightning imports
        return pytest.importorskip("lightning.pytorch")


def module_of(pl: Any, two_optimizers: bool = False) -> Any:
    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net, self.automatic_optimization = Net(), not two_optimizers

        def training_step(self, batch: dict[str, torch.Tensor], index: int) -> Any:
            loss = self.net(**batch)["loss"]
            if two_optimizers:
                for optimizer in self.optimizers():
                    optimizer.zero_grad()
                self.manual_backward(loss)
                for optimizer in self.optimizers():
                    optimizer.step()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            if two_optimizers:
                parts: list[nn.Module] = [self.net.last, self.net.first, self.net.second]
                return [torch.optim.SGD(part.parameters(), lr=0.1) for part in parts]
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    return Module()


def fit(pl: Any, module: Any, callbacks: list[Any], path: Path, epochs: int = 2) -> Any:
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path,
    )
    trainer.fit(module, DataLoader(Digits(), 8))
    return trainer


MIN_WEIGHT = PruneConfig(method="min_weight", sparsity=0.8)
ignore_lightning = pytest.mark.filterwarnings(
    "ignore::Warning:lightning", "ignore:The '.*dataloader' does not have"
)


def pruned_as_reported(report: PruneReport | None, weights: dict[str, torch.Tensor]) -> None:
    assert report is not None
    for layer in report:
        assert int((weights[f"{layer.name}.weight"] != 0).sum()) <= layer.kept


@ignore_lightning
def test_lightning_with_several_optimizers_prunes_what_each_trains(tmp_path: Path) -> None:
    pl = lightning()
    from wavprune.integrations.lightning import PruningCallback

    module, callback = module_of(pl, two_optimizers=True), PruningCallback(MIN_WEIGHT)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not pruned as their masks say")
        fit(pl, module, [callback], tmp_path)
    pruned_as_reported(callback.report, module.state_dict())
    assert callback.state_dict()["steps"] == 10


@ignore_lightning
@pytest.mark.filterwarnings("ignore:.* are not pruned as their masks say")
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", ["averages", "swa"])
def test_averaged_weights_are_pruned_when_saved_and_in_the_end(
    kind: str, first: bool, tmp_path: Path
) -> None:
    pl = lightning()
    from wavprune.integrations.lightning import PruningCallback

    callback = PruningCallback(PruneConfig(method="min_weight"), SCHEDULE)
    other = (
        pl.callbacks.EMAWeightAveraging(decay=0.5)
        if kind == "averages"
        else pl.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    )
    saver = pl.callbacks.ModelCheckpoint(tmp_path, monitor="loss", save_top_k=-1)
    both = [callback, other] if first else [other, callback]
    module = module_of(pl)
    fit(pl, module, [saver, *both], tmp_path, epochs=3)
    pruned_as_reported(callback.report, module.state_dict())
    assert callback.report is not None
    assert callback.report.sparsity == pytest.approx(0.8, abs=0.01)
    files = list(tmp_path.glob("*.ckpt"))
    assert len(files) == 3
    for file in files:
        saved = torch.load(file, weights_only=False)
        layers = saved["callbacks"]["PruningCallback"]["report"]["layers"]
        for layer in layers:
            weight = saved["state_dict"][f"{layer['name']}.weight"]
            assert int((weight != 0).sum()) <= layer["kept"]


@ignore_lightning
@pytest.mark.filterwarnings("ignore:.* are not pruned as their masks say")
def test_what_is_saved_after_a_validation_is_pruned(tmp_path: Path) -> None:
    pl = lightning()
    from wavprune.integrations.lightning import PruningCallback

    class Meddler(pl.Callback):  # type: ignore[misc,name-defined]
        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if not trainer.sanity_checking:
                pl_module.net.second.weight.data.add_(0.01)

    saver = pl.callbacks.ModelCheckpoint(
        tmp_path, monitor="loss", save_top_k=-1, save_weights_only=True
    )
    callback, module = PruningCallback(MIN_WEIGHT), module_of(pl)
    module.validation_step = lambda batch, batch_idx: module.log(
        "loss", module.net(**batch)["loss"]
    )
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=[saver, callback, Meddler()],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(Digits(), 8), DataLoader(Digits(), 8))
    files = list(tmp_path.glob("*.ckpt"))
    assert len(files) == 2
    for file in files:
        pruned_as_reported(callback.report, torch.load(file, weights_only=False)["state_dict"])


@ignore_lightning
def test_the_report_follows_a_checkpoint_that_is_loaded_for_a_test(tmp_path: Path) -> None:
    pl = lightning()
    from wavprune.integrations.lightning import PruningCallback

    callback = PruningCallback(PruneConfig(method="min_weight"), SCHEDULE)
    saver = pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, monitor="loss")
    module = module_of(pl)
    module.test_step = lambda batch, batch_idx: None
    trainer = fit(pl, module, [saver, callback], tmp_path)
    assert callback.report is not None
    assert callback.report.sparsity == pytest.approx(0.8, abs=0.01)
    trainer.test(module, DataLoader(Digits(), 8), tmp_path / "step=5.ckpt", weights_only=False)
    assert callback.report.sparsity == pytest.approx(SCHEDULE.sparsity(4), abs=0.01)
    pruned_as_reported(callback.report, module.state_dict())


@ignore_lightning
def test_two_callbacks_of_lightning_have_a_state_each(tmp_path: Path) -> None:
    pl = lightning()
    from wavprune.integrations.lightning import PruningCallback

    def callbacks() -> list[Any]:
        return [
            PruningCallback(PruneConfig(sparsity=s, targets=(f"net.{name}",)))
            for name, s in (("first", 0.5), ("second", 0.9))
        ]

    pair = callbacks()
    trainer = fit(pl, module_of(pl), pair, tmp_path, epochs=1)
    trainer.save_checkpoint(tmp_path / "pair.ckpt")
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=(resumed := callbacks()),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = DataLoader(Digits(), 8)
    trainer.fit(module_of(pl), data, ckpt_path=tmp_path / "pair.ckpt", weights_only=False)
    for callback, before in zip(resumed, pair, strict=True):
        assert [layer.name for layer in callback.report] == [layer.name for layer in before.report]
        assert callback.report.kept == before.report.kept
        assert callback.state_dict()["steps"] == 10


def hugging_face(model: nn.Module, to: Path, callbacks: list[Any], **settings: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments: dict[str, Any] = {
        "output_dir": str(to),
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "save_steps": 4,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 100,
        "lr_scheduler_type": "constant",
        "learning_rate": 0.05,
    }
    data = Digits()
    return Trainer(
        model,
        TrainingArguments(**{**arguments, **settings}),
        train_dataset=data,
        eval_dataset=data,
        callbacks=callbacks,
    )


ignore_hugging_face = pytest.mark.filterwarnings(
    "ignore::Warning:transformers",
    "ignore::Warning:accelerate",
    "ignore:'pin_memory' argument",
)


@ignore_hugging_face
def test_the_best_model_that_is_loaded_in_the_end_is_pruned_as_reported(tmp_path: Path) -> None:
    from wavprune.integrations.transformers import PruningCallback

    callback = PruningCallback(
        PruneConfig(method="min_weight"), Cubic(0.0, 0.8, start=0, end=8, every=4)
    )
    trainer = hugging_face(
        Net(),
        tmp_path,
        [callback],
        load_best_model_at_end=True,
        metric_for_best_model="first",
        greater_is_better=True,
        eval_strategy="steps",
        eval_steps=4,
    )
    values = iter([1.0, 0.5, 0.2])
    trainer.compute_metrics = lambda prediction: {"first": next(values)}
    with pytest.warns(UserWarning, match=r"2 of 2 layers of the model are not pruned .* once more"):
        trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    pruned_as_reported(callback.report, trainer.model.state_dict())
    assert callback.report is not None
    assert callback.report.sparsity == pytest.approx(0.8, abs=0.01)


@ignore_hugging_face
def test_masks_of_another_run_are_not_taken(tmp_path: Path) -> None:
    from wavprune.integrations.transformers import PruningCallback

    mine, other = tmp_path / "mine", tmp_path / "other"
    hugging_face(Net(), mine, [PruningCallback(schedule=SCHEDULE)]).train()
    model = Net()
    with torch.no_grad():
        model.first.weight.mul_(1.5)
    hugging_face(model, other, [PruningCallback(schedule=SCHEDULE)]).train()
    resume = str(mine / "checkpoint-4")
    with pytest.raises(ValueError, match=r"masks of other weights than the model has.*resume_from"):
        hugging_face(Net(), other, [PruningCallback(schedule=SCHEDULE)], max_steps=10).train(resume)
    different = PruningCallback(PruneConfig(wavelet="dct"), SCHEDULE)
    with pytest.raises(ValueError, match="the state is of wavelet='uhaar', this pruner of 'dct'"):
        hugging_face(Net(), mine, [different], max_steps=10).train(resume)
    (mine / "checkpoint-4" / "wavprune.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="this holds no masks"):
        hugging_face(Net(), mine, [PruningCallback(schedule=SCHEDULE)]).train(resume)


@ignore_hugging_face
def test_masks_are_files_like_others_and_every_callback_has_its_own(tmp_path: Path) -> None:
    from wavprune.integrations.transformers import PruningCallback

    def callbacks() -> list[Any]:
        return [
            PruningCallback(PruneConfig(sparsity=s, targets=(name,)))
            for name, s in (("first", 0.5), ("second", 0.9))
        ]

    pair = callbacks()
    old = os.umask(0o027)
    try:
        hugging_face(Net(), tmp_path, pair).train()
    finally:
        os.umask(old)
    folder = tmp_path / "checkpoint-4"
    files = sorted(folder.glob("wavprune*"))
    assert [file.name for file in files] == ["wavprune-2.safetensors", "wavprune.safetensors"]
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [0o640, 0o640]
    resumed = callbacks()[::-1]
    hugging_face(Net(), tmp_path, resumed).train(str(folder))
    for callback, before in zip(resumed[::-1], pair, strict=True):
        assert [layer.name for layer in callback.report] == [layer.name for layer in before.report]
        assert callback.report.kept == before.report.kept


@ignore_hugging_face
def test_a_hyperparameter_search_saves_masks_beside_each_checkpoint(tmp_path: Path) -> None:
    from transformers import TrainingArguments
    from transformers.trainer_callback import TrainerControl, TrainerState

    from wavprune.integrations.transformers import PruningCallback

    callback = PruningCallback(PruneConfig(sparsity=0.5))
    net = Net()
    args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    state, control = TrainerState(is_hyper_param_search=True), TrainerControl()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for run in ("run-0", "run-1", "named/deeper"):
        state.global_step = 0
        callback.on_train_begin(args, state, control, model=net, optimizer=optimizer)
        state.global_step = 2
        if run == "run-0":
            with pytest.warns(UserWarning, match="no folder checkpoint-2"):
                callback.on_save(args, state, control)
        folder = tmp_path / run / "checkpoint-2"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text("{}")
        callback.on_save(args, state, control)
        assert (folder / "wavprune.safetensors").exists()
