"""The same training run gives the same FLOPs through every trainer, and its figures reach the trainer's own logs."""

from __future__ import annotations

import importlib
import re
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl  # here, because its import wraps torch.compile for good
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback

from flopprof import Meter
from flopprof.errors import UsageError
from flopprof.integrations.tensorboard import scalars
from flopprof.meter.contiguous import Contiguous
from flopprof.meter.logged import Logged
from flopprof.meter.script import Script

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
    def train() -> None:
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for number, batch in enumerate(batches(accumulated=accumulated), 1):
            model(**batch)["loss"].backward()
            if number % accumulated == 0:
                optimizer.step()
                optimizer.zero_grad()

    return scripted(train)


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


def around_trainer(accumulated: int, tmp_path: Path) -> Meter:
    return scripted(lambda: trainer_of(tmp_path, TrainerCallback(), accumulated=accumulated).train())


def around_lightning(accumulated: int, tmp_path: Path) -> Meter:
    trainer = lightning_trainer(tmp_path, pl.Callback(), accumulate_grad_batches=accumulated)
    return scripted(lambda: trainer.fit(lightning_module(), batches(accumulated=accumulated), batches(1)))


def scripted(train: Any) -> Meter:
    script = Script(lambda: Contiguous(peak=1e12))
    script.install()
    try:
        train()
    finally:
        script.remove()
    assert script.meter is not None
    return script.meter


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize(
    "run", [around_trainer, around_lightning, by_track, by_script, by_accelerate, by_trainer, by_lightning]
)
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


# --- the trainers' own logs ------------------------------------------------------------------------------------------
def test_the_trainers_log_holds_the_figures_for_every_reporter(tmp_path: Path) -> None:
    from flopprof.integrations.transformers import FlopprofCallback

    class Reporter(TrainerCallback):
        seen: list[dict[str, Any]] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.seen.append(dict(logs))

    callback, reporter = FlopprofCallback(peak=1e12), Reporter()
    trainer = trainer_of(tmp_path, callback, eval_strategy="steps", eval_steps=2)
    trainer.callback_handler.callbacks.insert(0, reporter)  # as those of report_to are, before the user's
    result = trainer.train()
    losses = [logs for logs in reporter.seen if "loss" in logs]
    assert ["flopprof/mfu" in logs for logs in losses] == [False, True, True]  # of the first two steps none is timed
    assert not any(name.startswith("flopprof") for logs in reporter.seen if "eval_loss" in logs for name in logs)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry.get("flopprof/mfu") for entry in history] == [logs.get("flopprof/mfu") for logs in losses]
    whole = callback.summary().whole
    assert result.metrics["flopprof/mfu"] == whole.mfu == pytest.approx(STEP / whole.time_s * whole.steps / 1e12)
    assert flops(callback.meter) == [(STEP, STEP)] * STEPS
    assert callback.summary().rows["evaluation"] > 0


def test_a_trainer_that_resumes_goes_on_counting_steps(tmp_path: Path) -> None:
    from flopprof.integrations.transformers import FlopprofCallback
    from flopprof.meter.records import read

    path = tmp_path / "run.jsonl"
    for last, resume in ((4, None), (STEPS, True)):
        callback = FlopprofCallback(peak=1e12, records=path)
        trainer = trainer_of(tmp_path, callback, max_steps=last, save_strategy="steps", save_steps=4)
        trainer.train(resume_from_checkpoint=resume)
    assert [[record.step for record in process.records] for process in read(path)] == [[0, 1, 2, 3], [4, 5]]
    assert {record.model_flops for process in read(path) for record in process.records} == {STEP}
    assert callback.summary().rows["saving"] > 0


def test_a_trainer_in_mixed_precision(tmp_path: Path) -> None:
    from flopprof.integrations.transformers import FlopprofCallback

    callback = FlopprofCallback(peak={"bfloat16": 1e12, "float32": 1e11})
    trainer_of(tmp_path, callback, bf16=True).train()
    assert [record.flops for record in callback.meter.records] == [{"bfloat16": (STEP, STEP)}] * STEPS


def test_a_trainer_that_fails_leaves_no_hook_behind(tmp_path: Path) -> None:
    from flopprof.integrations.transformers import FlopprofCallback

    callback = FlopprofCallback(peak=1e12)
    trainer = trainer_of(tmp_path, callback)

    def fail(*_: Any) -> None:
        raise ValueError("no")

    trainer.model.second.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="no"):
        trainer.train()
    callback.on_train_end(trainer.args, trainer.state, trainer.control)


def test_lightning_logs_the_figures_with_its_own(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    from flopprof.integrations.lightning import FlopprofCallback

    callback = FlopprofCallback(peak=1e12)
    loggers = [CSVLogger(tmp_path / "csv", name="", version=""), TensorBoardLogger(tmp_path / "board", name="")]
    trainer = lightning_trainer(tmp_path, callback, logger=loggers, val_check_interval=2)
    trainer.fit(lightning_module(), batches(), batches(1))
    rows = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()
    header, values = rows[0].split(","), [row.split(",") for row in rows[1:]]
    at = {name: header.index(name) for name in ("flopprof/mfu", "flopprof/samples_per_s", "step")}
    assert [int(row[at["step"]]) for row in values] == [3, 5]  # step 1 has nothing timed yet
    assert all(float(row[at["flopprof/mfu"]]) > 0 for row in values)
    assert trainer.callback_metrics["flopprof/mfu"] == pytest.approx(callback.meter.metrics()["flopprof/mfu"])
    assert "flopprof/mfu" in scalars_in(next((tmp_path / "board").iterdir()))
    assert flops(callback.meter) == [(STEP, STEP)] * STEPS
    assert callback.summary().rows["evaluation"] > 0


def test_lightning_validates_while_it_accumulates(tmp_path: Path) -> None:
    """Of four validations, the first and the third lie inside a step of two batches."""
    from flopprof.integrations.lightning import FlopprofCallback

    slept = 0.0

    class Sleeps(pl.Callback):
        def on_validation_batch_start(self, *_: Any) -> None:
            nonlocal slept
            slept += 0.05
            time.sleep(0.05)

    callback = FlopprofCallback(peak=1e12)
    trainer = lightning_trainer(
        tmp_path, callback, accumulate_grad_batches=2, val_check_interval=3, max_epochs=1, num_sanity_val_steps=0
    )
    trainer.callbacks.append(Sleeps())
    trainer.fit(lightning_module(), batches(12), batches(1))
    assert slept >= 0.15
    assert callback.summary().rows["evaluation"] >= slept


def test_lightning_optimized_by_hand(tmp_path: Path) -> None:
    from flopprof.integrations.lightning import FlopprofCallback

    class Two(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.critic, self.generator = nn.Linear(WIDTH, 1, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            return [torch.optim.SGD(part.parameters(), lr=1e-3) for part in (self.critic, self.generator)]

        def training_step(self, batch: dict[str, torch.Tensor], _index: int) -> None:
            for part, optimizer in zip(("critic", "generator"), self.optimizers(), strict=True):
                made = self.generator(batch["x"])
                loss = self.critic(made.detach() if part == "critic" else made).sum()
                self.manual_backward(loss)
                optimizer.step()
                optimizer.zero_grad()

    callback = FlopprofCallback(peak=1e12)
    lightning_trainer(tmp_path, callback, max_steps=2 * STEPS, limit_val_batches=0).fit(Two(), batches())
    made, judged = 2 * ROWS * WIDTH * WIDTH, 2 * ROWS * WIDTH
    each = (made + 2 * judged) + (2 * made + 3 * judged)
    assert flops(callback.meter) == [(each, each)] * STEPS
    assert [record.optimizer_steps for record in callback.meter.records] == [2] * STEPS


def test_lightning_that_fails_leaves_no_hook_behind(tmp_path: Path) -> None:
    from flopprof.integrations.lightning import FlopprofCallback

    module = lightning_module()

    def fail(*_: Any) -> None:
        raise ValueError("no")

    module.net.second.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="no"):
        lightning_trainer(tmp_path, FlopprofCallback(peak=1e12)).fit(module, batches(), batches(1))


# --- loggers ---------------------------------------------------------------------------------------------------------
def scalars_in(directory: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def metered(log: Any, every: int = 2) -> Meter:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with Meter(model, peak=1e12, log=log, log_every=every) as meter:
        for batch in meter.track(batches(), progress=False):
            model(**batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    return meter


def test_tensorboard_shows_the_figures(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        meter = metered(scalars(writer, every=2))
    found = scalars_in(tmp_path)
    assert [step for step, _ in found["flopprof/mfu"]] == [4, 6]
    assert found["flopprof/mfu"][-1][1] == pytest.approx(meter.metrics()["flopprof/mfu"], rel=1e-6)
    assert set(found) == set(meter.metrics())


class WandB:
    """As wandb.log is called: log(data, step=None, commit=None)."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        assert all(isinstance(value, float) for value in data.values())
        self.rows.append(dict(data))


class MLflow:
    """As mlflow.log_metrics is called; it refuses names and values as the real one does."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def log(self, metrics: dict[str, float], step: int | None = None, synchronous: bool | None = None) -> None:
        for name, value in metrics.items():
            assert re.fullmatch(r"[/\w.\- ]+", name)
            float(value)
        self.rows.append(dict(metrics))


@pytest.mark.parametrize("kind", [WandB, MLflow])
def test_any_function_of_a_dict_may_log(kind: Any) -> None:
    logger = kind()
    meter = metered(logger.log)
    assert [bool(row) for row in logger.rows] == [False, True, True]
    assert logger.rows[-1] == meter.metrics()


@pytest.mark.parametrize("name", ["transformers", "lightning"])
def test_wrong_options_are_told_when_the_callback_is_made(name: str) -> None:
    callback = importlib.import_module(f"flopprof.integrations.{name}").FlopprofCallback
    with pytest.raises(UsageError, match="attention 'both'"):
        callback(attention="both")


def test_scalars_are_of_the_step_that_they_are_told() -> None:
    written: list[tuple[str, float, int | None]] = []

    class Writer:
        def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> None:
            written.append((tag, scalar_value, global_step))

    write = scalars(Writer(), every=3)
    write({"a": 1.0})
    write(Logged({"a": 2.0, "b": 3.0}, step=12))
    write({"a": 4.0})
    assert written == [("a", 1.0, 3), ("a", 2.0, 12), ("b", 3.0, 12), ("a", 4.0, 15)]
