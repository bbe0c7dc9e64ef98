"""Slopes of the groups' learning rates from backward passes, against differences of losses at points."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import clantune_scale
from clantune_scale.core.genome import Gene, Genome
from clantune_scale.core.line import Line, Point
from clantune_scale.core.strategies import RunFacts, build
from clantune_scale.errors import ConfigError, EvaluationError
from clantune_scale.planning.preflight import preflight
from clantune_scale.reference.clan import ReferenceClan
from clantune_scale.runtime.line import members
from clantune_scale.runtime.line.decays import decay_rule
from clantune_scale.runtime.line.points import Points
from tests.ranks import run_ranks
from tests.runtime.line.test_points import PLAN, START_STEP, STEPS, Model

GROUPS = ("first", "second")
GENES = tuple(Gene(f"lr:{group}", relative=True, target="lr", groups=(group,)) for group in GROUPS)
DECAY = Gene("weight_decay", relative=True)
STRATEGY = {"name": "clan", "options": {"group_slopes": True, "trial_cost": 0}}
SAMPLES, WINDOW, ROUND, TOTAL, NUM_STEPS = 4, 16, 5, 100, 20


@pytest.mark.parametrize("decays", [(1.0, 1.0), (0.6, 1.4)], ids=["rates", "with-decays"])
@pytest.mark.parametrize(("dtype", "step", "tolerance"), [(torch.float64, 1e-5, 1e-6), (torch.float32, 0.03, 2e-2)])
def test_slopes_are_the_differences_of_losses_at_neighbouring_points(dtype, step, tolerance, decays):
    """A step in float32 is so large that a loss's rounding is a hundredth of its difference."""
    ends = [{"lr:first": k, "lr:second": k, "weight_decay": d} for k, d in zip((0.85, 1.2), decays, strict=True)]
    shifted = [
        {**own, gene.name: own[gene.name] * torch.tensor(sign * step).double().exp().item()}
        for own in ends
        for gene in GENES
        for sign in (1, -1)
    ]
    members = [Genome(values) for values in (*ends, *shifted)]
    model = Model.new(lambda groups: torch.optim.AdamW(groups, lr=0.01), dtype, matrices_only=False)
    effect = [0.01, 0.03], [0.1, 0.1]
    for number in range(START_STEP):
        model.apply(model.gradient(number), number + 1, *effect)
    line = Line.of(members, (*GENES, DECAY), GROUPS)
    points = Points(
        lambda: model.parameters,
        model.average,
        group_of=[0, 1, 0],
        line=line,
        plan=PLAN,
        rules=[decay_rule(model.optimizer, group) for group in model.optimizer.param_groups],
    )
    for offset in range(STEPS):
        number = START_STEP + offset
        points.before_update(offset, *effect)
        model.apply(model.gradient(number), number + 1, *effect)
    with points.held() as write:
        losses = []
        for member in range(len(members)):
            write(member, True)
            losses.append(model_loss(model).item())
        found = []
        for member in range(2):
            write(member, True)
            gradient = torch.autograd.grad(model_loss(model), model.parameters)
            found.append(points.slopes(member, gradient).tolist())
    expected = [
        [(losses[place] - losses[place + 1]) / (2 * step) for place in (2 + 4 * end, 4 + 4 * end)] for end in range(2)
    ]
    assert found == [pytest.approx(own, rel=tolerance) for own in expected]
    assert found[0] != pytest.approx(found[1], rel=0.01)


def model_loss(model: Model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10_000)
    inputs = torch.randn(64, 6, generator=generator, dtype=torch.float64).to(model.parameters[0].dtype)
    return (model.output(inputs) - torch.sin(inputs[:, :3])).square().mean()


class Net(torch.nn.Module):
    """Returns its loss. One parameter gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(5, 8), torch.nn.Linear(8, 1)
        self.idle = torch.nn.Parameter(torch.ones(3))

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (self.second(torch.tanh(self.first(inputs))) - targets).square().mean()


def data(seed: int, count: int) -> TensorDataset:
    inputs = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(inputs, torch.sin(inputs.sum(dim=1, keepdim=True)))


def optimizer_of(parameters) -> torch.optim.Optimizer:
    """Of a net's parameters, whose first is the idle one."""
    idle, *others = parameters
    first, second = others[:2], [*others[2:], idle]
    groups = [{"params": first, "name": "first", "lr": 0.003}, {"params": second, "name": "second", "lr": 0.03}]
    return torch.optim.SGD(groups, momentum=0.9)


def block(directory, **changes) -> dict:
    return {
        "population_size": 4,
        "members": "line",
        "strategy": STRATEGY,
        "genes": {f"lr:{group}": {"groups": [group]} for group in GROUPS},
        "round_length": ROUND,
        "total_steps": TOTAL,
        "fitness": {"num_samples": WINDOW, "batch_size": SAMPLES},
        "tracking": {"directory": str(directory), "mlflow": False, "print_every_steps": 1000},
    } | changes


class Run:
    """A loop of a user's own; every step's whole batch is the reference clan's."""

    def __init__(self, wrap, config: dict, **options) -> None:
        inner = Net()
        self.model = wrap(inner)
        self.optimizer = optimizer_of(inner.parameters())
        self.is_parallel = dist.is_initialized()
        self.clan = clantune_scale.attach(
            self.model, self.optimizer, config=config, eval_data=data(9, WINDOW), micro_batch_size=SAMPLES, **options
        )
        self.slopes: list = []

    def train(self, num_steps: int) -> None:
        ranks, rank = (dist.get_world_size(), dist.get_rank()) if self.is_parallel else (1, 0)
        for step in range(num_steps):
            inputs, targets = (tensor.chunk(ranks)[rank] for tensor in data(100 + step, 8).tensors)
            self.model(inputs, targets).backward()
            held = {name: p.grad for name, p in self.model.named_parameters()}
            copies = {name: None if own is None else own.clone() for name, own in held.items()}
            self.optimizer.step()
            for name, parameter in self.model.named_parameters():
                own, before = parameter.grad, copies[name]
                assert own is held[name], f"{name}: the loop's gradient was exchanged"
                assert own is None or torch.equal(local(own), local(before)), f"{name}: the loop's gradient was changed"
            self.optimizer.zero_grad()
            if self.clan.fitness.slopes is not None and (step + 1) % ROUND == 0:
                self.slopes.append(self.clan.fitness.slopes)


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def plain(module):
    return module


def replicated(module):
    return DistributedDataParallel(module, find_unused_parameters=True)


def sharded(module):
    return fully_shard(module)


def _compared(wrap, dtype: torch.dtype, config: dict, is_parallel: bool) -> list[tuple[list, list, list]]:
    """By end of a round, the slopes that were measured, and differences of losses at points beside the two members'.

    [groups][ends][batches]; under FSDP2 a batch is the mean over ranks.
    """
    if is_parallel:
        dist.init_process_group("gloo")
    torch.set_default_dtype(dtype)
    step = 1e-5 if dtype is torch.float64 else 0.01
    seen, measure = [], members.at_points

    def with_differences(line: Line, points: Points, measurement, backend, **options):
        fitness = measure(line, points, measurement, backend, **options)
        ends, table = fitness.slopes.members, []
        for group in range(2):
            for end in ends:
                beside = [_beside(line.points[end], group, sign * step) for sign in (1, -1)]
                points._line = Line(line.centre, tuple(beside))
                with points.held() as write:
                    losses = []
                    for member in range(2):
                        write(member, True)
                        backend.refresh()
                        losses.append(measurement.losses())
                backend.refresh()
                difference = (losses[0] - losses[1]) / (2 * step)
                joint = 2 if wrap is sharded else 1
                table.append(difference.reshape(-1, joint).mean(axis=1).tolist())
                points._line = line
        measured = [own.tolist() for gene in GENES for own in fitness.slopes.by_gene[gene.name]]
        seen.append((measured, table, fitness.losses.tolist()))
        return fitness

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(members, "at_points", with_differences)
        run = Run(wrap, config)
        run.train(NUM_STEPS)
    run.clan.detach()
    return seen


def _beside(point: Point, group: int, step: float) -> Point:
    rates = list(point.rates)
    rates[group] *= math.exp(step)
    return Point(tuple(rates), point.decays)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("wrap", [plain, replicated, sharded])
def test_an_engines_slopes_are_differences_of_its_losses(wrap, dtype, tmp_path):
    """And the loop's own gradients are what they were."""
    config = block(tmp_path)
    if wrap is plain:
        default = torch.get_default_dtype()
        ranks = [_compared(wrap, dtype, config, False)]
        torch.set_default_dtype(default)
    else:
        ranks = run_ranks(2, _compared, wrap, dtype, config, True)
    assert all(seen == ranks[0] for seen in ranks)
    assert len(ranks[0]) == NUM_STEPS // ROUND
    for measured, differences, losses in ranks[0]:
        assert len(measured) == len(differences) == 4 and len(losses[0]) == WINDOW // SAMPLES
        for own, expected in zip(measured, differences, strict=True):
            if dtype is torch.float64:
                assert own == pytest.approx(expected, rel=1e-6, abs=1e-10)
            else:  # the difference of two losses near 1 has an error of 1e-7, over two steps of 0.01
                assert own == pytest.approx(expected, rel=1e-2, abs=5e-5)
    assert max(abs(slope) for own in ranks[0][-1][0] for slope in own) > 1e-3


def test_an_engine_decides_as_its_reference(tmp_path):
    run = Run(plain, block(tmp_path))
    run.train(NUM_STEPS)
    reference = ReferenceClan(
        Net(),
        strategy=build("clan", RunFacts(4, run.clan.genes, 0, ROUND, 0.1, TOTAL), STRATEGY["options"]),
        optimizer=optimizer_of,
        loss_fn=lambda module, batch: module(*batch),
        batch=lambda step, member, micro, plan: [part.chunk(4)[member] for part in data(100 + step, 8).tensors],
        eval_batches=[data(9, WINDOW)[start : start + SAMPLES] for start in range(0, WINDOW, SAMPLES)],
        members="line",
    )
    reference.run(NUM_STEPS)
    ours, theirs = run.clan.population.memory["centre"], reference.population.memory["centre"]
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert ours["lr:first"] - ours["lr:second"] > 0.1  # the first group's rate was a tenth of the other's


def refusal(wrap, config: dict, **options) -> str:
    with pytest.raises((ConfigError, EvaluationError)) as refused:
        Run(wrap, config, **options)
    return str(refused.value)


def test_what_has_no_slopes_is_refused_before_the_first_step(tmp_path):
    shared = refusal(plain, block(tmp_path, genes={"lr": {}}))
    assert "two genes or more" in shared and "lr (all groups)" in shared
    twice = {"lr:first": {"groups": ["first"]}, "lr:both": {"groups": ["first", "second"]}}
    assert "each for groups of its own" in refusal(plain, block(tmp_path, genes=twice))
    number = refusal(plain, block(tmp_path), evaluate=lambda model, batch: model(*batch).item())
    assert "it has none" in number and "Return the loss as a tensor" in number
    scaled = refusal(plain, block(tmp_path), scaler=torch.amp.GradScaler("cpu"))
    assert "this loop scales its loss" in scaled and "Leave the option out" in scaled


def test_a_config_says_what_deepspeed_and_groups_cannot(tmp_path):
    config = {"train_micro_batch_size_per_gpu": 4, "train_batch_size": 16}
    line = preflight({**config, "clantune": block(tmp_path)}, world_size=4).errors
    assert any("DeepSpeed collects gradients in buffers of its own" in text for text in line)
    groups = preflight({**config, "clantune": block(tmp_path, members="groups")}, world_size=4).errors
    assert any('Set "members" to "line"' in text for text in groups)
