"""A language model that trains in milliseconds, and its data, for frameworks that take any module with a loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

VOCABULARY, LENGTH = 12, 8


class SmallLm(nn.Module):
    """Predicts the next token from the one before it, with dropout. Takes Trainer's count of tokens."""

    def __init__(self, *, dropout: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.token = nn.Embedding(VOCABULARY, 16)
        self.hidden = nn.Linear(16, 24)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(24, VOCABULARY)

    def forward(self, input_ids, labels=None, num_items_in_batch=None, **_):
        logits = self.head(self.drop(torch.tanh(self.hidden(self.token(input_ids)))))
        if labels is None:
            return {"logits": logits}
        reduction = "mean" if num_items_in_batch is None else "sum"
        loss = F.cross_entropy(
            logits[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1), ignore_index=-100, reduction=reduction
        )
        return {"loss": loss if num_items_in_batch is None else loss / num_items_in_batch, "logits": logits}


class Texts(Dataset):
    """Walks over a ring of tokens; samples have labels of different lengths, -100 behind them."""

    def __init__(self, size: int, *, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        steps = torch.randint(1, 3, (size, LENGTH), generator=draw)
        self.ids = steps.cumsum(1) % VOCABULARY
        self.labels = self.ids.clone()
        for row, length in enumerate(torch.randint(4, LENGTH + 1, (size,), generator=draw).tolist()):
            self.labels[row, length:] = -100

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}
