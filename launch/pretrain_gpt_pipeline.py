"""Pretrains a byte-level GPT with DeepSpeed's pipeline engine; with a "clantune" block in its config, as a clan.

deepspeed --num_accelerators 4 launch/pretrain_gpt_pipeline.py --deepspeed --deepspeed_config configs/pipeline.json
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from corpus import Corpus
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.utils import RepeatingLoader
from gpt import VOCABULARY, Block, initialize_weights
from pretrain_gpt import parse_arguments
from torch import Tensor, nn
from torch.utils.data import DataLoader
from training import load_corpus

import clantune_scale


class Token(nn.Embedding):
    """Embeds bytes; its weight is the output layer's too."""

    def __init__(self, width: int) -> None:
        super().__init__(VOCABULARY, width)
        initialize_weights(self)


class Position(nn.Module):
    """Adds where a byte stands."""

    def __init__(self, context: int, width: int, dropout: float) -> None:
        super().__init__()
        self.position = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        initialize_weights(self.position)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: [batch, time, width], and so is what comes back."""
        return self.dropout(x + self.position(torch.arange(x.shape[1], device=x.device)))


class Layer(Block):
    """A block with its first weights."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__(width, num_heads, dropout)
        self.apply(initialize_weights)


def layers(arguments: argparse.Namespace) -> list[LayerSpec]:
    """GPT as a sequence; the first and the last share the embedding."""
    block = (arguments.width, arguments.heads, arguments.dropout)
    return [
        TiedLayerSpec("token", Token, arguments.width),
        LayerSpec(Position, arguments.context, arguments.width, arguments.dropout),
        *(LayerSpec(Layer, *block) for _ in range(arguments.layers)),
        LayerSpec(nn.LayerNorm, arguments.width),
        TiedLayerSpec("token", Token, arguments.width, forward_fn=lambda token, x: F.linear(x, token.weight)),
    ]


def next_byte_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats per byte."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def inputs_and_targets(windows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """What the first stage reads and what the last one does."""
    batch = torch.stack(windows)
    return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


def main() -> None:
    """Trains, then prints the test loss."""
    arguments = parse_arguments()
    is_first_rank = os.environ.get("RANK", "0") == "0"
    config, block = clantune_scale.load_config(arguments.deepspeed_config)
    if block is not None and block.enabled:
        # A PipelineModule is built over the whole world: after join(), that is the member.
        clantune_scale.join(block)
    deepspeed.init_distributed()
    corpus = load_corpus(arguments)
    torch.manual_seed(arguments.seed)
    model = PipelineModule(layers(arguments), num_stages=config["pipeline"]["stages"], loss_fn=next_byte_loss)
    engine, *_ = clantune_scale.initialize(
        args=arguments,
        model=model,
        model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
        training_data=corpus.train,
        eval_data=corpus.validation,
        collate_fn=inputs_and_targets,
    )
    while engine.global_steps < arguments.steps:
        engine.train_batch()
    loss = test_loss(engine, corpus, num_windows=arguments.test_windows)
    if is_first_rank:
        print(f"test loss {loss:.4f} nats per byte", flush=True)


def test_loss(engine: Any, corpus: Corpus, *, num_windows: int) -> float:
    """The loss on text that neither training nor selection has seen; the champion's if there is a clan."""
    clan = getattr(engine, "clan", None)
    if clan is not None:
        summary = clan.finish()
        losses = clan.evaluate(corpus.test, num_samples=num_windows, collate_fn=inputs_and_targets)
        return losses[summary.champion]
    size = engine.train_micro_batch_size_per_gpu()
    loader = DataLoader(corpus.test, batch_size=size, drop_last=True, collate_fn=inputs_and_targets)
    return engine.eval_batch(iter(RepeatingLoader(loader)), num_micro_batches=num_windows // size).item()


if __name__ == "__main__":
    main()
