"""Weights in 16 bits without fp32 masters: what is rounded, and what is not."""

from __future__ import annotations

import pytest
import torch

from clantune_scale.core.line import averaging_weight
from clantune_scale.errors import ConfigError, EvaluationError
from clantune_scale.tracking import read_events
from tests.runtime.line.test_optimizers import Net, attach, data, train

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


class HalfNet(Net):
    """Computes in 16 bits and gives its loss in float32."""

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.loss(inputs, targets).float()

    def loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs, targets)


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(trained(model), lr=0.05, momentum=0.9)


@HALF
def test_a_control_clan_is_the_plain_run_to_the_last_bit(dtype, tmp_path):
    batches = list(torch.utils.data.DataLoader(data(dtype=dtype), 8))
    plain, model = HalfNet(dtype), HalfNet(dtype)
    for module in (plain, model):
        optimizer = sgd(module)
        steps = ([batch] for batch in batches)
        if module is model:
            steps = attach(tmp_path, module, optimizer, dtype=dtype, strategy="control").steps(batches, until=8)
        for step in steps:
            for batch in step:
                module(*batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert not torch.equal(model.out.weight, HalfNet(dtype).out.weight)


@HALF
@pytest.mark.parametrize("store", ["device", "host"])
def test_points_are_the_formula_in_fp32_rounded_once_and_the_centre_comes_back_to_the_last_bit(dtype, store, tmp_path):
    model = HalfNet(dtype)
    optimizer = sgd(model)
    walked: list[list[torch.Tensor]] = []
    # Before the clan's own hook, in which a round ends.
    optimizer.register_step_post_hook(lambda *_: walked.append([p.detach().clone() for p in trained(model)]))
    clan = attach(tmp_path, model, optimizer, dtype=dtype, line={"store": store})
    start = [p.detach().clone() for p in trained(model)]
    averages = [p.float() for p in start]
    seen: list[list[torch.Tensor]] = []
    inner = clan.measurement.losses

    def losses(window=None):
        seen.append([p.detach().clone() for p in trained(model)])
        return inner(window)

    clan.measurement.losses = losses
    plan, points = clan.phases.position.plan, clan.members._line.points
    train(clan, model, [optimizer], [], plan.num_steps, dtype=dtype)
    still = [p.float() for p in start]
    for number, weights in enumerate(walked, start=1):
        weight = averaging_weight(number, plan.ema_window_steps)
        for average, own in zip(averages, weights, strict=True):
            average.lerp_(own.float(), weight)
    assert plan.uses_ema and len(seen) == len(set(points)) == 4
    for point, found in zip(points, seen, strict=True):
        for anchor, average, own in zip(still, averages, found, strict=True):
            wanted = (average + (point.rates[0] - 1.0) * (average - anchor)).to(dtype)
            # Sums of float32 in another order may fall on the other side of the middle between two neighbours.
            assert own.dtype == dtype and (own == wanted).float().mean() > 0.95
            torch.testing.assert_close(own, wanted, rtol=torch.finfo(dtype).eps, atol=1e-7)
    assert all(tensor.dtype == torch.float32 for tensor in clan.measurement.ema.tensors)


@HALF
def test_going_on_from_the_centre_keeps_the_very_bits_of_the_loop(dtype, tmp_path):
    model = HalfNet(dtype)
    optimizer = sgd(model)
    clan = attach(tmp_path, model, optimizer, dtype=dtype, line={"go_on_from": "centre"})
    after: list[list[torch.Tensor]] = []
    end = clan._end_round

    def end_round(plan):
        before = [p.detach().clone() for p in trained(model)]
        average = [t.clone() for t in clan.measurement.ema.tensors]
        end(plan)
        after.append(before)
        assert all(torch.equal(a, b) for a, b in zip(before, trained(model), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(average, clan.measurement.ema.tensors, strict=True))

    clan._end_round = end_round
    train(clan, model, [optimizer], [], 10, dtype=dtype)
    assert len(after) == 2 and all(len(set(record.losses)) > 1 for record in clan.progress.lineage)


class WithMasters(torch.optim.SGD):
    """Keeps the weights once more in fp32, updates those, and rounds them into the model."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    master = self.state[p].setdefault("master", p.detach().float())
                    p.copy_(master.sub_(p.grad.float(), alpha=group["lr"]))


def test_an_optimizer_with_masters_of_its_own_goes_on_from_the_centre(tmp_path):
    model = HalfNet(torch.bfloat16)
    optimizer = WithMasters(trained(model), lr=0.05)
    clan = attach(tmp_path, model, optimizer, dtype=torch.bfloat16)
    train(clan, model, [optimizer], [], 10, dtype=torch.bfloat16)
    for record in clan.progress.lineage:
        assert len({genome.values["lr"] for genome in record.genomes}) == 1
    for p in trained(model):
        assert torch.equal(p, optimizer.state[p]["master"].to(p))


def test_what_is_rounded_is_said_in_the_first_line(tmp_path, capfd):
    model = HalfNet(torch.bfloat16)
    clan = attach(tmp_path, model, sgd(model), dtype=torch.bfloat16)
    clan.finish()
    assert "weights are rounded to bfloat16 (by up to 2^-8 of each) when written" in capfd.readouterr().out
    start = read_events(clan.recorder.run_dir / "events.jsonl")[0]
    assert start["rounded_to"] == "bfloat16"


def test_a_loss_in_16_bits_is_refused_before_the_first_step(tmp_path):
    model = HalfNet(torch.bfloat16)
    model.forward = model.loss
    with pytest.raises(EvaluationError, match=r"returns its loss in torch.bfloat16.*7.8e-03.*float32"):
        attach(tmp_path, model, sgd(model), dtype=torch.bfloat16)


def test_members_in_groups_still_need_fp32(tmp_path):
    from clantune_scale.backends.torch.refusals import require_known_parameters

    model = HalfNet(torch.bfloat16)
    with pytest.raises(ConfigError, match='"members" to "line"'):
        require_known_parameters([{"params": trained(model)}], list(model.named_parameters()), takes_half=False)
