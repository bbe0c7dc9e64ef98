"""Short runs of Trainer on the small model, with a clan and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from clantune_scale.integrations.transformers import ClanCallback
from tests.integrations.small_lm import SmallLm, Texts

#: A trial of four competitors in steps 6 to 26 of 40.
TRIAL = {"name": "clan", "options": {"trial_cost": 1.5, "trial_at": 0.15}}
STEPS = 40
_OF_TRAINER = ("model", "eval_dataset", "data_collator", "compute_loss_func", "optimizers")


def block(**changes: Any) -> dict[str, Any]:
    settings = {
        "population_size": 4,
        "round_length": 6,
        "strategy": TRIAL,
        "genes": {"lr": {}},
        "fitness": {"num_samples": 32, "batch_size": 8},
        "tracking": {"mlflow": False, "run_name": "run", "print_every_steps": 1000},
    }
    return settings | changes


class NotingTrainer(Trainer):
    """A Trainer that notes the batches of its loop: [steps][micro-batches]."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[list[dict[str, Any]]] = []

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        samples = super().get_batch_samples(*args, **kwargs)
        self.seen.append(
            [
                {name: value.clone() if torch.is_tensor(value) else value for name, value in batch.items()}
                for batch in samples[0]
            ]
        )
        return samples


def trainer_of(folder: Path, callback: ClanCallback | None = None, **changes: Any) -> NotingTrainer:
    """A Trainer of the small model; ``changes`` go to it, and all others to its arguments."""
    keywords = {name: changes.pop(name) for name in _OF_TRAINER if name in changes}
    callbacks = changes.pop("callbacks", [])
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "linear",
        "warmup_steps": 3,
        "weight_decay": 0.1,
        "max_steps": STEPS,
        "save_strategy": "no",
        "logging_steps": 5,
        "disable_tqdm": True,
        "report_to": [],
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    return NotingTrainer(
        args=TrainingArguments(**(settings | changes)),
        train_dataset=Texts(90, seed=1),
        callbacks=[*callbacks, *([callback] if callback else [])],
        **{"model": SmallLm(), "eval_dataset": Texts(64, seed=2), **keywords},
    )
