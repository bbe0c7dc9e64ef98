"""What every engine's members must do, whatever the engine: one suite, run for each of its cases.

A rank-side function imports its family by name, because some engines are only imported in the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from clantune_scale.config.gene_catalogue import build_gene
from clantune_scale.config.schema import GeneConfig
from clantune_scale.core.strategies import RunFacts, build
from clantune_scale.data.sampler import ClanBatchSampler
from clantune_scale.reference.clan import ReferenceClan
from tests.backends.families import FAMILIES, Setup, family
from tests.ranks import run_ranks

Weights = dict[str, torch.Tensor]


def _cases(*, slow: tuple[str, ...] = ()) -> list[Any]:
    """Every case of every family, the slow ones and those of the families in ``slow`` marked."""
    found = []
    for name in FAMILIES:
        for case, setup in family(name).CASES.items():
            marks = [pytest.mark.slow] if setup.is_slow or name in slow else []
            found.append(pytest.param(name, setup, id=f"{name}-{case}", marks=marks))
    return found


def _run(world_size: int, function: Callable, name: str, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """``function(name, *args)`` on ranks that have the family's engine loaded."""
    preload = getattr(family(name), "PRELOAD", "tests.preload")
    return run_ranks(world_size, function, name, *args, preload=preload, timeout_s=timeout_s)


every_case = pytest.mark.parametrize(("name", "setup"), _cases())
# Its launches take eight seconds each, and these tests have six.
without_megatron = pytest.mark.parametrize(("name", "setup"), _cases(slow=("megatron",)))


def _leave(result: Any) -> Any:
    """Leaves the process group in order, so that no rank ends while another still talks."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return result


def _block(setup: Setup, directory: Any, **changes: Any) -> dict:
    return {
        "population_size": setup.members,
        "round_length": 5,
        "fitness": {"num_samples": 32, "batch_size": 4},
        "tracking": {"directory": str(directory), "mlflow": False, "print_every_steps": 1000},
    } | changes


def _scripted(setup: Setup, directory: Any, rounds: list[Any]) -> dict:
    return _block(
        setup, directory, strategy={"name": "tests.backends.scripted:Scripted", "options": {"rounds": rounds}}
    )


def _train(name: str, setup: Setup, block: dict | None, num_steps: int) -> Weights:
    run = family(name).start(setup, block)
    run.train(num_steps)
    return _leave(run.weights())


def _difference(first: Weights, second: Weights) -> float:
    assert first.keys() == second.keys() and first
    return max((first[name] - second[name]).abs().max().item() for name in first)


def _assert_equal(first: Weights, second: Weights) -> None:
    assert first.keys() == second.keys() and first
    assert all(torch.equal(first[name], second[name]) for name in first)


@without_megatron
def test_cooperating_with_equal_genomes_is_the_engines_own_data_parallelism(name, setup, tmp_path):
    flat = _run(setup.world_size, _train, name, setup, None, 8)
    block = _block(setup, tmp_path, strategy="control", total_steps=8)
    clan = _run(setup.world_size, _train, name, setup, block, 8)
    tolerance = setup.tolerance or family(name).TOLERANCE[setup.dtype]
    assert max(_difference(weights, flat[0]) for weights in clan) <= tolerance


def _compete_and_clone(name: str, setup: Setup, block: dict) -> list[Weights]:
    """After 3 steps of competition, the clone that follows the 4th, 3 more steps, one cooperative step."""
    run = family(name).start(setup, block)
    seen = []
    for num_steps in (3, 7, 8):
        run.train(num_steps)
        seen.append(run.weights())
    return _leave(seen)


def _independent(name: str, setup: Setup) -> list[Weights]:
    """The same member without a clan, after 3 and 7 steps."""
    run = family(name).start(setup, None)
    seen = []
    for num_steps in (3, 7):
        run.train(num_steps)
        seen.append(run.weights())
    return _leave(seen)


@without_megatron
def test_competing_leaks_nothing_and_a_clone_goes_on_as_its_donor(name, setup, tmp_path):
    """Each member equals a run of its own to the last bit; then all are the donor, which trained undisturbed."""
    factors = [1.0, 2.0, 0.5, 4.0][: setup.members]
    equal = [1.0] * setup.members
    script = [["competitive", 4, factors, 0], ["competitive", 3, equal, -1], ["cooperative", 9, factors, -1]]
    clan = _run(setup.world_size, _compete_and_clone, name, setup, _scripted(setup, tmp_path, script))
    members = [clan[member * setup.member_size] for member in range(setup.members)]
    for rank, seen in enumerate(clan):
        for weights, expected in zip(seen, members[rank // setup.member_size], strict=True):
            _assert_equal(weights, expected)
    for member in range(2):
        alone = Setup(**{**vars(setup), "members": 1, "lr": setup.lr * factors[member]})
        expected = _run(setup.member_size, _independent, name, alone)[0]
        _assert_equal(members[member][0], expected[0])
        if member == 0:
            for clone in members:
                _assert_equal(clone[1], expected[1])
    assert _difference(members[0][0], members[1][0]) > 1e-4
    _assert_proportional(members, factors, family(name).TOLERANCE[setup.dtype])


def _assert_proportional(members: list[list[Weights]], factors: list[float], tolerance: float) -> None:
    """One step from equal states by equal gradients: as long as the member's own rate."""
    steps = [{n: seen[2][n] - seen[1][n] for n in seen[2]} for seen in members]
    assert _difference(steps[0], {n: torch.zeros_like(t) for n, t in steps[0].items()}) > 1e-5
    for step, factor in zip(steps, factors, strict=True):
        scaled = {n: t * factor for n, t in steps[0].items()}
        # The differences of float32 weights near 1 are known to about 1e-7 each.
        assert _difference(step, scaled) <= max(tolerance, 1e-6)


@every_case
def test_a_clan_of_rounds_agrees_with_its_reference(name, setup, tmp_path):
    """Three rounds of ``classic``: the same decisions; weights equal but for the order of float32 sums."""
    if setup.dtype != "fp32":
        pytest.skip("the reference clan computes in float32: 16-bit engines are compared with themselves")
    options = {"strategy": "classic", "duty_cycle": 0.4, "genes": {"lr": {"step_size": 0.3}}}
    block = _block(setup, tmp_path, **options)
    clan = _run(setup.world_size, _rounds, name, setup, block, 15)
    reference = _reference(name, setup, block, 15)
    assert any(record.donors != tuple(range(setup.members)) for record in reference.lineage)
    for rank, (weights, lineage) in enumerate(clan):
        assert [record.donors for record in lineage] == [record.donors for record in reference.lineage]
        for record, expected in zip(lineage, reference.lineage, strict=True):
            assert record.losses == pytest.approx(expected.losses, rel=1e-5)
        twin = reference.members[rank // setup.member_size].module
        expected = {n: p.detach() for n, p in twin.named_parameters()}
        # Fifteen steps of AdamW over sums in another order.
        assert _difference(weights, expected) < 2e-5


def _rounds(name: str, setup: Setup, block: dict, num_steps: int) -> tuple[Weights, list[Any]]:
    run = family(name).start(setup, block)
    run.train(num_steps)
    return _leave((run.weights(), list(run.clan.progress.lineage)))


def _stop_and_resume(name: str, setup: Setup, block: dict, stops: list[int], num_steps: int) -> list[Weights]:
    """The uninterrupted run, then one that stops after each number of steps and goes on as another."""
    module = family(name)
    seen = []
    for stop in [0, *stops]:
        torch.manual_seed(stop)
        own = {**block, "tracking": {**block["tracking"], "run_name": f"stopped-after-{stop}"}}
        run = module.start(setup, own)
        if stop:
            run.train(stop)
            run.clan.stop()
            checkpoint = {**own.get("checkpoint", {}), "resume": str(run.clan.recorder.run_dir)}
            run = module.start(setup, {**own, "checkpoint": checkpoint})
        run.train(num_steps)
        seen.append(run.weights())
        run.clan.rounds.finish()
        run.clan.detach()
    return _leave(seen)


@without_megatron
def test_a_run_that_stopped_anywhere_goes_on_as_if_it_had_not(name, setup, tmp_path):
    """Mid-cooperative, at a phase's end, mid-competitive, at a round's end: equal to the last bit a round later."""
    block = _block(setup, tmp_path, strategy="classic", duty_cycle=0.4, genes={"lr": {"step_size": 0.3}})
    stops = [2, 3, 4, 5] if setup.is_slow else [2, 4]
    # DDP learns its buckets anew in the first step after a restart, and gloo's order of a sum over four ranks
    # depends on where in its bucket an element lies: its family names the tolerance of that.
    tolerance = getattr(family(name), "RESUME_TOLERANCE", 0.0)
    for whole, *resumed in _run(setup.world_size, _stop_and_resume, name, setup, block, stops, 7):
        assert all(_difference(weights, whole) <= tolerance for weights in resumed)


class _Feed:
    """Micro-batches of whole members: what the member's data-parallel ranks read between them."""

    def __init__(self, dataset: Any, micro: int, setup: Setup) -> None:
        self._dataset, self._plans = dataset, {}
        self._samplers = [
            ClanBatchSampler(
                len(dataset),
                seed=0,
                micro_batch_size=micro * setup.dp,
                dp_size=1,
                dp_rank=0,
                member=member,
                population_size=setup.members,
                plan=lambda step, member=member: self._plans[member],
            )
            for member in range(setup.members)
        ]

    def __call__(self, step: int, member: int, micro: int, plan: Any) -> Any:
        self._plans[member] = plan
        sampler = self._samplers[member]
        indices = next(iter(sampler))
        sampler.consume()
        return torch.utils.data.default_collate([self._dataset[index] for index in indices])


def _reference(name: str, setup: Setup, block: dict, num_steps: int) -> ReferenceClan:
    module = family(name)
    train, valid = module.datasets()
    genes = tuple(build_gene(n, GeneConfig(**g), found=setup.lr) for n, g in block["genes"].items())
    facts = RunFacts(
        population_size=setup.members,
        genes=genes,
        seed=0,
        round_length_steps=block["round_length"],
        duty_cycle=block["duty_cycle"],
    )
    kinds = {
        "adamw": lambda parameters: torch.optim.AdamW(
            parameters, lr=setup.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01
        ),
        "sgd": lambda parameters: torch.optim.SGD(parameters, lr=setup.lr, momentum=0.9),
    }
    clan = ReferenceClan(
        module.twin(),
        strategy=build(block["strategy"], facts),
        optimizer=kinds[setup.optimizer],
        loss_fn=module.twin_loss,
        batch=_Feed(train, module.MICRO, setup),
        eval_batches=_window(valid, block["fitness"]),
        num_micro_batches=setup.accumulation,
        clip=setup.clip,
    )
    clan.run(num_steps)
    return clan


def _window(valid: Any, fitness: dict) -> list[Any]:
    """The batches of the validation window, spread evenly over the dataset as ``ValidationWindow`` does."""
    count, size = min(fitness["num_samples"], len(valid)), fitness["batch_size"]
    indices = torch.linspace(0, len(valid) - 1, count, dtype=torch.float64).round().long().tolist()
    return [
        torch.utils.data.default_collate([valid[index] for index in indices[begin : begin + size]])
        for begin in range(0, count, size)
    ]
