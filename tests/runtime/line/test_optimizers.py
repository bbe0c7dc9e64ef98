"""Optimizers on the line: several at once, with an evaluation mode, with state in their groups, without a rate."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import TensorDataset

import clantune_scale
from clantune_scale.errors import ClanError, ConfigError

FEATURES, WIDTH = 6, 8


class Net(torch.nn.Module):
    """Returns its loss; a matrix, a bias, and a frozen layer."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = torch.nn.Linear(FEATURES, FEATURES).requires_grad_(False)
        self.hidden, self.out = torch.nn.Linear(FEATURES, WIDTH), torch.nn.Linear(WIDTH, 1)
        self.to(dtype)

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (self.out(torch.tanh(self.hidden(self.frozen(inputs)))) - targets).square().mean()


class ScheduleFree(torch.optim.Optimizer):
    """Defazio et al. 2024, SGD: trains at y, is to be evaluated at the average x; ``eval()`` and ``train()`` switch."""

    def __init__(self, params, lr: float, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0, "is_training": True})

    @torch.no_grad()
    def _move(self, weight: float) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if "z" in self.state[p]:
                    p.lerp_(self.state[p]["z"], weight)

    def eval(self) -> None:
        for group in self.param_groups:
            assert group["is_training"]
            group["is_training"] = False
        self._move(1.0 - 1.0 / self.param_groups[0]["beta"])

    def train(self) -> None:
        for group in self.param_groups:
            assert not group["is_training"]
            group["is_training"] = True
        self._move(1.0 - self.param_groups[0]["beta"])

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            assert group["is_training"], "a step in evaluation mode"
            group["k"] += 1
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.detach().clone())
                p.lerp_(z, 1.0 / group["k"])
                p.add_(p.grad, alpha=group["lr"] * (group["beta"] * (1.0 - 1.0 / group["k"]) - 1.0))
                z.sub_(p.grad, alpha=group["lr"])


def data(count: int = 64, dtype: torch.dtype = torch.float32) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, FEATURES, generator=generator).to(dtype)
    return TensorDataset(inputs, torch.sin(inputs.sum(dim=1, keepdim=True)))


def attach(directory, model, optimizer, scheduler=None, *, dtype=torch.float32, scaler=None, eval_data=None, **block):
    config = {
        "population_size": 4,
        "members": "line",
        "round_length": 5,
        "total_steps": 100,
        "strategy": {"name": "clan", "options": {"trial_cost": 0.6, "trial_at": 0.1}},
        "fitness": {"num_samples": 32, "batch_size": 8},
        "tracking": {"directory": str(directory), "mlflow": False, "print_every_steps": 1000},
    }
    return clantune_scale.attach(
        model,
        optimizer,
        scheduler,
        config=config | block,
        eval_data=eval_data or data(32, dtype),
        micro_batch_size=8,
        scaler=scaler,
    )


def train(clan, model, optimizers, schedulers, until, *, dtype=torch.float32):
    for step in clan.steps(clan.loader(data(dtype=dtype)), until=until):
        for batch in step:
            model(*batch).backward()
        for optimizer in optimizers:
            optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
        for optimizer in optimizers:
            optimizer.zero_grad()


def muon_and_adamw(model):
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() == 2]
    rest = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    return [torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1), torch.optim.AdamW(rest, lr=0.01, weight_decay=0.1)]


class Container:
    """As torchtitan's: steps all of its optimizers."""

    def __init__(self, optimizers) -> None:
        self.optimizers = optimizers


@pytest.mark.parametrize("given", [list, Container], ids=["a list", "a container"])
def test_several_optimizers_take_one_step_together(given, tmp_path):
    model = Net()
    optimizers = muon_and_adamw(model)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(one, 0.99) for one in optimizers]
    clan = attach(tmp_path, model, given(optimizers), schedulers)
    before = clan.fitness.mean[0]
    train(clan, model, optimizers, schedulers, 50)
    assert clan.num_steps == 50 and [one.last_epoch for one in schedulers] == [50, 50]
    assert [group["lr"] for group in clan.backend.param_groups()] == pytest.approx([0.02 * 0.99**50, 0.01 * 0.99**50])
    rounds = list(clan.progress.lineage)
    assert any(len(set(record.losses)) == 4 for record in rounds)
    # The trial is among them: each competitor's optimizers began where the phase began.
    assert any(phase.kind.value == "competitive" for record in rounds for phase in record.phases)
    assert clan.fitness.mean.min() < 0.7 * before
    assert clan.backend.optimizer_name() == "Muon, AdamW"


def test_a_control_clan_with_several_optimizers_is_the_plain_run_to_the_last_bit(tmp_path):
    batches = list(torch.utils.data.DataLoader(data(), 8))
    plain, model = Net(), Net()
    for module, own in ((plain, muon_and_adamw(plain)), (model, muon_and_adamw(model))):
        if module is model:
            steps = attach(tmp_path, module, own, strategy="control").steps(batches, until=8)
        else:
            steps = ([batch] for batch in batches)
        for step in steps:
            for batch in step:
                module(*batch).backward()
            for optimizer in own:
                optimizer.step()
                optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert not torch.equal(model.out.weight, Net().out.weight)


def test_optimizers_that_do_not_step_together_are_named(tmp_path):
    model = Net()
    optimizers = muon_and_adamw(model)
    clan = attach(tmp_path, model, optimizers)
    with pytest.raises(ClanError, match="optimizer 0 steps for the second time, and optimizer 1 has not stepped"):
        for step in clan.steps(clan.loader(data())):
            for batch in step:
                model(*batch).backward()
            optimizers[0].step()
            optimizers[0].step()


def test_a_schedule_free_optimizer_is_measured_in_its_evaluation_mode_and_its_weights_are_not_moved(tmp_path):
    model = Net()
    optimizer = ScheduleFree([p for p in model.parameters() if p.requires_grad], lr=0.2)
    clan = attach(tmp_path, model, optimizer)
    train(clan, model, [optimizer], [], 45)
    assert optimizer.param_groups[0]["is_training"] and optimizer.param_groups[0]["k"] == 45
    weights = [p.detach().clone() for p in model.parameters()]
    measured = clan.measurement.fitness(averaged=False).mean[0]
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    optimizer.eval()
    model.eval()
    by_hand = torch.stack([model(*batch) for batch in torch.utils.data.DataLoader(data(32), 8)]).mean()
    optimizer.train()
    assert measured == pytest.approx(float(by_hand.detach()), rel=1e-6)
    # Training went on from the centre, and the lineage says with which rates.
    for record in list(clan.progress.lineage)[:2]:
        assert len({genome.values["lr"] for genome in record.genomes}) == 1
    summary = clan.finish()
    assert summary.champion == 0


def test_an_optimizer_without_a_rate_is_refused(tmp_path):
    model = Net()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(ConfigError, match="parameter group 0 of SGD has the learning rate None"):
        attach(tmp_path, model, optimizer)


def test_a_model_without_trainable_parameters_is_refused(tmp_path):
    model = Net().requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter of the optimizer trains"):
        attach(tmp_path, model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("go_on_from", ["fittest", "centre"])
def test_weights_of_any_layout_and_precision_are_measured_and_restored(dtype, go_on_from, tmp_path):
    model = Net(dtype)
    with torch.no_grad():
        model.hidden.weight.set_(model.hidden.weight.t().contiguous().t())  # not contiguous
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    clan = attach(tmp_path, model, optimizer, dtype=dtype, line={"go_on_from": go_on_from})
    train(clan, model, [optimizer], [], 12, dtype=dtype)
    assert not model.hidden.weight.is_contiguous() and model.hidden.weight.dtype == dtype
    assert all(len(set(record.losses)) == 4 for record in list(clan.progress.lineage)[:2])
    genomes = clan.progress.lineage[0].genomes
    assert len({genome.values["lr"] for genome in genomes}) == (4 if go_on_from == "fittest" else 1)


def test_attaching_after_steps_were_taken_starts_the_clan_there(tmp_path):
    model = Net()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for batch in torch.utils.data.DataLoader(data(), 8):
        model(*batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    clan = attach(tmp_path, model, optimizer)
    train(clan, model, [optimizer], [], 12)
    assert clan.num_steps == 12 and int(optimizer.state[model.out.weight]["step"]) == 20


def test_a_measurement_that_is_not_finite_at_one_point_only_makes_it_the_last(tmp_path):
    model = Net()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    clan = attach(tmp_path, model, optimizer)
    calls = []
    inner = clan.measurement.losses

    def losses(window=None):
        found = inner(window)
        calls.append(found)
        return found * float("nan") if len(calls) == 2 else found

    clan.measurement.losses = losses
    train(clan, model, [optimizer], [], 5)
    record = clan.progress.lineage[0]
    assert record.losses[1] is None and record.donors[1] != 1 and len(set(record.donors)) == 1
    assert all(torch.isfinite(p).all() for p in model.parameters())
