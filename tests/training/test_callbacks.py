from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from wavprune import PruneConfig, Pruner, PruneReport
from wavprune.bases.basis import basis_for
from wavprune.training.schedules import Cubic

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
