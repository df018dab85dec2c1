"""The same training run gives the same FLOPs through every trainer, and its figures reach the trainer's own logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl  # here, because its import wraps torch.compile for good
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from flopprof import Meter
from flopprof.meter.script import Contiguous, Script

# What the trainers' packages themselves warn of.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
    pytest.mark.filterwarnings("ignore:.*`LeafSpec`"),
    pytest.mark.filterwarnings("ignore:.*isinstance.*treespec"),
]

ROWS, WIDTH, HIDDEN, CLASSES, STEPS = 4, 8, 16, 3, 6
# Two layers: forward of both, both weights' gradients, and the second one's input's.
FIRST, SECOND = 2 * ROWS * WIDTH * HIDDEN, 2 * ROWS * HIDDEN * CLASSES
STEP = 2 * FIRST + 3 * SECOND


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.second(self.first(x).relu())
        found = {"logits": logits}
        return found if labels is None else {"loss": nn.functional.cross_entropy(logits, labels), **found}


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(count, WIDTH, generator=generator)
        self.labels = torch.randint(0, CLASSES, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[index], "labels": self.labels[index]}


def batches(steps: int = STEPS, accumulated: int = 1) -> DataLoader[dict[str, torch.Tensor]]:
    return DataLoader(Rows(ROWS * steps * accumulated), batch_size=ROWS)


def flops(meter: Meter | None) -> list[tuple[int | None, int | None]]:
    assert meter is not None
    return [(record.model_flops, record.hardware_flops) for record in meter.records]


# --- one run, by each of them ----------------------------------------------------------------------------------------
def by_track(accumulated: int, tmp_path: Path) -> Meter:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with Meter(model, peak=1e12) as meter:
        loader = iter(batches(accumulated=accumulated))
        for _ in range(STEPS):
            with meter.step():
                for _ in range(accumulated):
                    model(**next(loader))["loss"].backward()
                optimizer.step()
                optimizer.zero_grad()
    return meter


def by_script(accumulated: int, tmp_path: Path) -> Meter:
    script = Script(lambda: Contiguous(peak=1e12))
    script.install()
    try:
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for number, batch in enumerate(batches(accumulated=accumulated), 1):
            model(**batch)["loss"].backward()
            if number % accumulated == 0:
                optimizer.step()
                optimizer.zero_grad()
    finally:
        script.remove()
    assert script.meter is not None
    return script.meter


def by_accelerate(accumulated: int, tmp_path: Path) -> Meter:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    try:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
        model = Net()
        model, optimizer, loader = accelerator.prepare(
            model, torch.optim.AdamW(model.parameters(), lr=1e-3), batches(accumulated=accumulated)
        )
        with Meter(model, peak=1e12) as meter:
            for batch in meter.track(loader, progress=False):
                with accelerator.accumulate(model):
                    accelerator.backward(model(**batch)["loss"])
                    optimizer.step()
                    optimizer.zero_grad()
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
    return meter


def trainer_of(tmp_path: Path, callback: Any, *, accumulated: int = 1, **arguments: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    given = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        **{
            "per_device_train_batch_size": ROWS,
            "gradient_accumulation_steps": accumulated,
            "max_steps": STEPS,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 2,
            **arguments,
        },
    )
    data = Rows(ROWS * STEPS * accumulated)
    return Trainer(model=Net(), args=given, train_dataset=data, eval_dataset=Rows(5), callbacks=[callback])


def by_trainer(accumulated: int, tmp_path: Path) -> Meter:
    from flopprof.integrations.transformers import FlopprofCallback

    callback = FlopprofCallback(peak=1e12)
    trainer_of(tmp_path, callback, accumulated=accumulated).train()
    assert callback.meter is not None
    return callback.meter


def lightning_trainer(tmp_path: Path, callback: Any, **arguments: Any) -> Any:
    return pl.Trainer(
        **{
            "max_steps": STEPS,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(tmp_path),
            "callbacks": [callback],
            "log_every_n_steps": 2,
            "num_sanity_val_steps": 1,
            **arguments,
        }
    )


def lightning_module() -> Any:
    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: dict[str, torch.Tensor], _index: int) -> torch.Tensor:
            return self.net(**batch)["loss"]

        def validation_step(self, batch: dict[str, torch.Tensor], _index: int) -> None:
            self.net(**batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    return Module()


def by_lightning(accumulated: int, tmp_path: Path) -> Meter:
    from flopprof.integrations.lightning import FlopprofCallback

    callback = FlopprofCallback(peak=1e12)
    trainer = lightning_trainer(tmp_path, callback, accumulate_grad_batches=accumulated)
    trainer.fit(lightning_module(), batches(accumulated=accumulated), batches(1))
    assert callback.meter is not None
    return callback.meter


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("run", [by_track, by_script, by_accelerate, by_trainer, by_lightning])
def test_the_same_run_gives_the_same_flops(run: Any, accumulated: int, tmp_path: Path) -> None:
    meter = run(accumulated, tmp_path)
    found = flops(meter)
    if run is by_accelerate:  # a step of track() is a batch
        assert found == [(STEP, STEP)] * STEPS * accumulated
        assert sum(record.optimizer_steps for record in meter.records) == STEPS
        return
    assert found == [(accumulated * STEP, accumulated * STEP)] * STEPS
    assert [record.step for record in meter.records] == list(range(STEPS))
    assert [record.samples for record in meter.records] == [accumulated * ROWS] * STEPS
    assert [record.optimizer_steps for record in meter.records] == [1] * STEPS
    assert meter.figures().mfu == pytest.approx(meter.figures().model_flops_per_s / 1e12)
