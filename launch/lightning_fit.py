"""Pretrains a byte-level GPT in Lightning's Trainer, tuned by one callback.

python launch/lightning_fit.py --config configs/line.json
python launch/lightning_fit.py --config configs/line.json --devices 2 --strategy ddp
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from training import add_arguments, build_gpt, load_corpus

from clantune_scale.integrations.lightning import ClanCallback


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pretrains a byte-level GPT in Lightning's Trainer.")
    parser.add_argument("--config", type=Path, required=True, help='JSON file with the "clantune" block')
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=32, help="windows per device and step")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--strategy", default="auto", help="of the Trainer: auto, ddp, ...")
    parser.add_argument("--output", type=Path, default=Path("."), help="folder of checkpoints and of the clan's runs")
    parser.add_argument("--resume", type=Path, help="checkpoint to go on from")
    add_arguments(parser)
    return parser.parse_args()


class Pretraining(LightningModule):
    """The GPT; its batches are windows of bytes."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__()
        self.gpt, self.lr = build_gpt(arguments), arguments.lr

    def training_step(self, windows: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.gpt(windows)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, windows: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.gpt(windows)
        self.log("val_loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, betas=(0.9, 0.95), weight_decay=0.1)


def main() -> None:
    """Trains, then prints where the champion is."""
    arguments = parse_arguments()
    corpus = load_corpus(arguments)
    clan = ClanCallback(arguments.config)
    seed_everything(arguments.seed, verbose=False)
    trainer = Trainer(
        max_steps=arguments.steps,
        devices=arguments.devices,
        strategy=arguments.strategy,
        gradient_clip_val=1.0,
        val_check_interval=min(arguments.steps, 250),
        check_val_every_n_epoch=None,
        limit_val_batches=8,
        default_root_dir=arguments.output,
        callbacks=[clan, ModelCheckpoint(every_n_train_steps=250, save_top_k=-1, filename="{step}")],
        logger=False,
        enable_progress_bar=False,
    )
    loaders = {
        "train_dataloaders": DataLoader(corpus.train, arguments.batch, shuffle=True, drop_last=True),
        "val_dataloaders": DataLoader(corpus.validation, arguments.batch),
    }
    trainer.fit(Pretraining(arguments), ckpt_path=arguments.resume, **loaders)
    if trainer.is_global_zero and clan.summary is not None:
        print(f"champion of loss {clan.summary.champion_loss:.4f} in {clan.summary.run_dir}", flush=True)


if __name__ == "__main__":
    main()
