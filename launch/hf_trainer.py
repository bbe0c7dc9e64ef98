"""Pretrains a byte-level GPT with Hugging Face's Trainer, which a clan on the line tunes.

python launch/hf_trainer.py --config configs/line.json --output_dir out
torchrun --nproc_per_node 2 launch/hf_trainer.py --config configs/line.json --output_dir out --batch 16
deepspeed launch/hf_trainer.py --deepspeed DS.json --output_dir out        # DS.json has the "clantune" block
"""

from __future__ import annotations

import argparse

import torch
from gpt import GPT
from torch import Tensor, nn
from training import add_arguments, build_gpt, load_corpus
from transformers import Trainer, TrainingArguments

from clantune_scale.integrations.transformers import ClanCallback


class LanguageModel(nn.Module):
    """The GPT as Trainer wants it: arguments by name, and a mapping with the loss.

    Args:
        gpt: that is trained.
    """

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.gpt = gpt

    def forward(self, windows: Tensor, return_loss: bool = True) -> dict[str, Tensor]:
        """``windows``: [batch, context + 1] int64; the loss is in nats per byte."""
        return {"loss": self.gpt(windows)}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pretrains a byte-level GPT with Hugging Face's Trainer.")
    parser.add_argument("--config", help='JSON file with the "clantune" block; --deepspeed\'s file if left out')
    parser.add_argument("--deepspeed", help="DeepSpeed's config, as Trainer takes it")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in output_dir")
    parser.add_argument("--batch", type=int, default=32, help="windows per device and step")
    parser.add_argument("--save_steps", type=int, default=500)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher; not used")
    add_arguments(parser)
    return parser.parse_args()


def main() -> None:
    """Trains, then prints the losses on validation and test text."""
    arguments = parse_arguments()
    settings = TrainingArguments(
        output_dir=arguments.output_dir,
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch,
        per_device_eval_batch_size=arguments.batch,
        learning_rate=arguments.lr,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=0.1,
        save_steps=arguments.save_steps,
        logging_steps=50,
        report_to=[],
        deepspeed=arguments.deepspeed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=arguments.seed,
    )
    corpus = load_corpus(arguments)
    trainer = Trainer(
        model=LanguageModel(build_gpt(arguments)),
        args=settings,
        train_dataset=corpus.train,
        eval_dataset=corpus.validation,
        data_collator=lambda windows: {"windows": torch.stack(windows)},
        callbacks=[ClanCallback(arguments.config)],
    )
    trainer.train(resume_from_checkpoint=arguments.resume)
    for name, split in {"validation": corpus.validation, "test": corpus.test}.items():
        some = torch.utils.data.Subset(split, range(min(arguments.test_windows, len(split))))
        loss = trainer.evaluate(some)["eval_loss"]
        if trainer.is_world_process_zero():
            print(f"{name} loss {loss:.4f} nats per byte", flush=True)


if __name__ == "__main__":
    main()
