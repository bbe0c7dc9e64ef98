"""``optimizer.step(closure)``: the gradient is computed before the update, once; what needs more is refused."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import TensorDataset

import clantune_scale
from clantune_scale.errors import ClanError, ConfigError
from tests.small_references import squared_error


class Net(torch.nn.Linear):
    def forward(self, inputs, targets):
        return squared_error(super().forward, (inputs, targets))


def _data(size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(size, 3, generator=torch.Generator().manual_seed(0))
    return inputs, inputs.sum(dim=1, keepdim=True)


def _attached(tmp_path, optimizer, **block):
    torch.manual_seed(0)
    model = Net(3, 1)
    settings = {
        "population_size": 3,
        "members": "line",
        "round_length": 4,
        "strategy": "control",
        "tracking": {"directory": str(tmp_path), "mlflow": False},
        "checkpoint": {"every_rounds": None, "champion": False},
    }
    made = optimizer(model.parameters())
    clan = clantune_scale.attach(
        model, made, config=settings | block, eval_data=TensorDataset(*_data()), micro_batch_size=4
    )
    return model, made, clan


def _adam(parameters):
    return torch.optim.Adam(parameters, lr=0.1)


def _train(model, optimizer, *, as_keyword: bool, closures: bool) -> list[float]:
    batch, losses = _data(), []

    def closure():
        optimizer.zero_grad()
        loss = model(*batch)
        loss.backward()
        return loss.detach()

    for _ in range(8):
        if closures:
            losses.append(float(optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)))
        else:
            losses.append(float(closure()))
            optimizer.step()
    return losses


@pytest.mark.parametrize("as_keyword", [True, False])
def test_steps_with_a_closure_are_the_steps_without(as_keyword, tmp_path):
    model, optimizer, clan = _attached(tmp_path, _adam, genes={"lr": {"initial": 0.5}})
    losses = _train(model, optimizer, as_keyword=as_keyword, closures=True)
    other, theirs, _ = _attached(tmp_path, _adam, genes={"lr": {"initial": 0.5}})
    assert losses == _train(other, theirs, as_keyword=False, closures=False)
    assert torch.equal(model.weight, other.weight) and clan.num_steps == 8
    # The members' rates are 0.5 times the optimizer's: the closure has not moved the update out of the clan's hands.
    plain = Net(3, 1)
    plain.load_state_dict(Net.state_dict(_attached(tmp_path, _adam)[0]))
    _train(plain, torch.optim.Adam(plain.parameters(), lr=0.05), as_keyword=False, closures=False)
    torch.testing.assert_close(model.weight, plain.weight, rtol=0, atol=1e-6)


class TwoGradients(torch.optim.SGD):
    """Steps by the gradient at a point further on, as SAM and extragradient do."""

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            closure()
        super().step()
        with torch.enable_grad():
            closure()
        super().step()


def test_an_optimizer_that_takes_a_second_gradient_is_refused_when_it_asks(tmp_path):
    model, optimizer, _ = _attached(tmp_path, lambda parameters: TwoGradients(parameters, lr=0.1))
    with pytest.raises(ClanError, match="TwoGradients calls its closure again after it has moved the weights"):
        _train(model, optimizer, as_keyword=False, closures=True)


def test_lbfgs_is_refused_by_name_before_the_first_step(tmp_path):
    with pytest.raises(ConfigError, match="LBFGS calls its closure several times"):
        _attached(tmp_path, lambda parameters: torch.optim.LBFGS(parameters))
