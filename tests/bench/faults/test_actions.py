"""What is spoilt is spoilt once, and said: a run that comes through proves something only then."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from clantune_scale.bench.faults.actions import ACTIONS, INJECTED


def _gradients(module: torch.nn.Module) -> tuple[float, bool]:
    """The loss of a pass, and whether all of its gradients are finite."""
    module.zero_grad()
    loss = module(torch.ones(2, 3)).square().sum()
    loss.backward()
    return loss.item(), all(bool(parameter.grad.isfinite().all()) for parameter in module.parameters())


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_one_pass_is_spoilt_and_the_next_is_as_before(what, value, capsys):
    module = torch.nn.Linear(3, 2)
    whole = _gradients(module)
    ACTIONS[f"{value}-{what}"](None)
    assert INJECTED not in capsys.readouterr().err
    loss, is_finite = _gradients(module)
    assert not is_finite and math.isfinite(loss) == (what == "gradient")
    assert capsys.readouterr().err.count(INJECTED) == 1
    assert _gradients(module) == whole


def test_a_pass_without_gradients_is_no_training_step(capsys):
    module = torch.nn.Linear(3, 2)
    ACTIONS["nan-loss"](None)
    with torch.no_grad():
        assert module(torch.ones(2, 3)).isfinite().all()
    assert not _gradients(module)[1] and INJECTED in capsys.readouterr().err


def test_the_first_of_the_masters_is_spoilt(capsys):
    masters = [torch.ones(2), torch.ones(2)]
    ACTIONS["nan-weights"](SimpleNamespace(backend=SimpleNamespace(masters=lambda: masters)))
    assert masters[0].isnan().all() and masters[1].isfinite().all() and INJECTED in capsys.readouterr().err


def test_transfers_are_spoilt_as_often_as_is_said_and_on_recipients_alone(capsys):
    moves = []
    clan = SimpleNamespace(transfers=SimpleNamespace(transport=SimpleNamespace(move=lambda *_: moves.append(1))))
    ACTIONS["spoil-transfers"](clan)
    state = SimpleNamespace(tensors=[("a", torch.zeros(2))])
    for before in (None, 0, 0, 0):
        clan.transfers.transport.move(state, SimpleNamespace(before=before))
    assert len(moves) == 4 and state.tensors[0][1].tolist() == [2.0, 0.0]
    assert capsys.readouterr().err.count(INJECTED) == 2
