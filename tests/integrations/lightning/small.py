"""A small regression in Lightning's Trainer, and the same run in a loop of the project's own."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

import clantune_scale
from clantune_scale.integrations.lightning import ClanCallback

MICRO, ACCUMULATION, RATE, CLIP = 4, 2, 0.01, 1.0
#: Steps of a trial, and where it starts: two rounds before it and two after it.
TRIAL = {"name": "clan", "options": {"trial_cost": 0.6, "trial_at": 0.09}}
TOTAL, ROUND, NUM_STEPS = 100, 5, 40
#: Micro-batches in an epoch: an odd number, so that its last step has one in place of two.
EPOCH = 25


def dataset(seed: int, size: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 4, generator=generator)
    return TensorDataset(inputs, torch.sin(inputs.sum(dim=1, keepdim=True)))


TRAIN, VALID = dataset(1, EPOCH * MICRO), dataset(2, 32)


class Net(torch.nn.Module):
    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Dropout(dropout), torch.nn.Linear(8, 1)
        )

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (self.layers(inputs) - targets).square().mean()


class Module(LightningModule):
    """Notes what it is trained on, and what it sees of the Trainer."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.net = Net(dropout)
        self.seen: list[tuple[int, int, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.net(*batch)
        self.seen.append((self.trainer.global_step, batch_idx, float(batch[0].sum())))
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.net(*batch)
        self.log("val_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=RATE)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class ManualModule(Module):
    """Accumulates, clips and steps by itself."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__(dropout)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss / ACCUMULATION)
        if (batch_idx + 1) % ACCUMULATION == 0 or batch_idx + 1 == self.trainer.num_training_batches:
            optimizer = self.optimizers()
            self.clip_gradients(optimizer, gradient_clip_val=CLIP, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()
        return loss


class ResumableLoader(DataLoader):
    """Goes on where it was, as torchdata's does; in order."""

    def __init__(self, data: Any = TRAIN) -> None:
        super().__init__(data, batch_size=MICRO)
        self.num_given = self._start = 0

    def state_dict(self) -> dict[str, int]:
        return {"num_given": self.num_given % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._start = state["num_given"]

    def __iter__(self) -> Iterator[Any]:
        start, self._start = self._start, 0
        for index, batch in enumerate(super().__iter__()):
            if index >= start:
                self.num_given = index + 1
                yield batch


def block(directory: Any, **changes: Any) -> dict[str, Any]:
    settings = {
        "population_size": 4,
        "members": "line",
        "round_length": ROUND,
        "total_steps": TOTAL,
        "strategy": TRIAL,
        "fitness": {"num_samples": 32, "batch_size": 8},
        "tracking": {"directory": str(directory), "mlflow": False, "print_every_steps": 1000},
        "checkpoint": {"champion": False},
    }
    return settings | changes


def fit(
    directory: Any,
    config: dict[str, Any] | None,
    *,
    module: Module | None = None,
    num_steps: int = NUM_STEPS,
    ckpt_path: Any = None,
    save_every: int | None = None,
    callback: dict[str, Any] | None = None,
    data: TensorDataset = TRAIN,
    callbacks_after: Sequence[Any] = (),
    **options: Any,
) -> tuple[Module, Trainer, ClanCallback | None]:
    """A run of the Trainer; without a clan if ``config`` is None. ``options`` are the Trainer's."""
    module = module or Module()
    torch.manual_seed(1)
    clan = None if config is None else ClanCallback(config, **(callback or {}))
    saving = {"save_top_k": -1, "filename": "{step}", "dirpath": f"{directory}/saved"}
    checkpoint = [ModelCheckpoint(every_n_train_steps=save_every, **saving)] if save_every else []
    is_automatic = module.automatic_optimization
    settings: dict[str, Any] = {
        "max_steps": num_steps,
        "accumulate_grad_batches": ACCUMULATION if is_automatic else 1,
        "gradient_clip_val": CLIP if is_automatic else None,
        "default_root_dir": directory,
        "callbacks": [*([] if clan is None else [clan]), *checkpoint, *callbacks_after],
        "enable_checkpointing": bool(checkpoint),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "accelerator": "cpu",
        "devices": 1,
    }
    trainer = Trainer(**settings | options)
    trainer.fit(module, ResumableLoader(data), DataLoader(VALID, batch_size=8), ckpt_path=ckpt_path)
    return module, trainer, clan


def loop(directory: Any, config: dict[str, Any], *, num_steps: int = NUM_STEPS) -> tuple[Net, Any]:
    """The same run by ``clan.steps``: an epoch's last step has one micro-batch there too."""
    net = Net(0.0)  # the two loops make iterators, which draw from the stream that dropout draws from, at other places
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    torch.manual_seed(1)

    def step(calls: Any) -> None:
        optimizer.zero_grad()
        for args, kwargs in calls:
            (net(*args, **kwargs) / ACCUMULATION).backward()
        clan.clip_grad_norm_()
        optimizer.step()
        schedule.step()

    clan = clantune_scale.attach(
        net,
        optimizer,
        schedule,
        config=config | {"tracking": {**config["tracking"], "directory": f"{directory}/loop"}},
        eval_data=VALID,
        micro_batch_size=MICRO,
        accumulation=ACCUMULATION,
        gradient_clipping=CLIP,
        train_step=step,
    )
    batches: list[Any] = []
    while clan.num_steps < num_steps:
        for index, batch in enumerate(DataLoader(TRAIN, batch_size=MICRO)):
            batches.append((tuple(batch), {}))
            if len(batches) == ACCUMULATION or index == EPOCH - 1:
                step(batches)
                batches = []
            if clan.num_steps >= num_steps:
                break
    return net, clan


def saved_state(path: Any) -> dict[str, Any]:
    """A checkpoint's content without the callbacks' own, and without the clan's mark in parameter groups."""
    state = copy.deepcopy(torch.load(path, weights_only=True))
    del state["callbacks"]
    for optimizer in state["optimizer_states"]:
        for group in optimizer["param_groups"]:
            group.pop("clantune_lr", None)
    return state
