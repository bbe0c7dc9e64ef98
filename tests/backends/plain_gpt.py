"""Megatron-core's GPT written in plain torch, with the same names for the same weights: the twin of its members."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

VOCABULARY, WIDTH, HEADS, LAYERS, CONTEXT = 32, 16, 4, 2, 8
NUM_TRAIN, NUM_VALID = 640, 64


class _Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.position_embeddings = nn.Embedding(CONTEXT, WIDTH)


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # Head by head: query, key, value.
        self.linear_qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.linear_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.linear_qkv(x).unflatten(-1, (HEADS, 3, -1)).permute(3, 0, 2, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.linear_proj(mixed.transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.linear_fc2 = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(WIDTH)
        self.self_attention = _Attention()
        self.pre_mlp_layernorm = nn.LayerNorm(WIDTH)
        self.mlp = _Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attention(self.input_layernorm(x))
        return x + self.mlp(self.pre_mlp_layernorm(x))


class _Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer() for _ in range(LAYERS))
        self.final_layernorm = nn.LayerNorm(WIDTH)


class PlainGPT(nn.Module):
    """Two layers over 32 tokens; ``forward`` gives the loss of a window of ``CONTEXT + 1`` tokens."""

    def __init__(self, *, is_tied: bool = False, seed: int = 0) -> None:
        super().__init__()
        self.embedding, self.decoder = _Embedding(), _Decoder()
        if not is_tied:
            self.output_layer = nn.Linear(WIDTH, VOCABULARY, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                is_scale = name.endswith("layernorm.weight")
                parameter.copy_(1 + 0.1 * noise if is_scale else 0.2 * noise)

    def forward(self, window: Tensor) -> Tensor:
        tokens, labels = window[:, :-1], window[:, 1:]
        x = self.embedding.word_embeddings(tokens) + self.embedding.position_embeddings.weight[: tokens.shape[1]]
        for layer in self.decoder.layers:
            x = layer(x)
        head = self.output_layer if hasattr(self, "output_layer") else self.embedding.word_embeddings
        logits = F.linear(self.decoder.final_layernorm(x), head.weight)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def token_datasets() -> tuple[TensorDataset, TensorDataset]:
    """Sequences in which a token mostly says what the next one is: train, validation."""
    generator = torch.Generator().manual_seed(5)
    count = NUM_TRAIN + NUM_VALID
    tokens = [torch.randint(VOCABULARY, (count,), generator=generator)]
    for _ in range(CONTEXT):
        surprise = torch.randint(VOCABULARY, (count,), generator=generator)
        is_surprising = torch.rand(count, generator=generator) < 0.2
        tokens.append(torch.where(is_surprising, surprise, (3 * tokens[-1] + 7) % VOCABULARY))
    windows = torch.stack(tokens, dim=1)
    return TensorDataset(windows[:NUM_TRAIN]), TensorDataset(windows[NUM_TRAIN:])
