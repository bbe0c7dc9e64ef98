"""The model: what it computes is a byte's loss, causal, and it learns."""

from __future__ import annotations

import math

import pytest
import torch

from launch.gpt import GPT


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(context=16, width=32, num_layers=2, num_heads=4)


def test_loss_at_the_start_is_that_of_a_guess(model):
    loss = model(torch.randint(256, (8, 17)))
    # Small weights make almost uniform predictions: log 256 nats, to within what std 0.02 moves them.
    assert loss.shape == () and loss.item() == pytest.approx(math.log(256), abs=0.05)


def test_no_byte_sees_its_successors(model):
    hidden = []
    model.norm.register_forward_hook(lambda module, inputs, output: hidden.append(output.detach()))
    window = torch.randint(256, (1, 17))
    changed = window.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 256
    model(window)
    model(changed)
    differs = (hidden[0] != hidden[1]).any(dim=-1)[0]
    assert not differs[:9].any() and differs[9:].all()


def test_embedding_and_head_are_one_tensor(model):
    assert model.head.weight is model.token.weight
    assert sum(p.numel() for p in model.parameters()) == 256 * 32 + 16 * 32 + 2 * 12_704 + 2 * 32


def test_it_learns_a_text(model):
    window = torch.tensor([list(b"to be or not to b")])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        loss = model(window)
        loss.backward()
        optimizer.step()
    # Counting letters alone gives 1.76 nats: it has to use what came before.
    assert loss.item() < 1.3


def test_dropout_is_modules_with_a_probability():
    model = GPT(context=8, width=16, num_layers=3, num_heads=2, dropout=0.25)
    found = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert found == [0.25] * 7


def test_width_that_does_not_divide_among_heads():
    with pytest.raises(ValueError, match="width 30 is not a multiple of 4 heads"):
        GPT(context=8, width=30, num_layers=1, num_heads=4)
