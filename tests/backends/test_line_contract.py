"""What every engine's clan on the line must do: all ranks train one model, which stands for all members."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clantune_scale.config.gene_catalogue import build_gene
from clantune_scale.config.schema import GeneConfig
from clantune_scale.core.rounds import PhaseKind
from clantune_scale.core.strategies import RunFacts, build
from clantune_scale.data.sampler import ClanBatchSampler
from clantune_scale.reference.clan import ReferenceClan
from tests.backends.families import FAMILIES, Setup, family
from tests.backends.test_contract import _assert_equal, _block, _difference, _leave, _run, _train, _window

#: Steps of a trial, and where it starts: two rounds before it and two after it.
TRIAL = {"trial_cost": 0.6, "trial_at": 0.09}
TOTAL, ROUND = 100, 5
NUM_STEPS = 40
#: The cases of the other contract that say something new on the line: one of each kind of sharding and precision.
CHOSEN = {
    "zero": ("0", "1", "2", "3", "1-bf16", "3-bf16"),
    "pipeline": ("1-tied", "1-dp"),
    "deepspeed_tp": ("auto-1", "mpu-1"),
    "deepspeed_moe": ("1",),
    "fsdp": ("dp", "dp-tp", "bf16", "compiled"),
    "ddp": ("dp", "compiled"),
    "megatron": ("dp-distributed", "tp-pp", "dp-bf16"),
}
#: Those that a run without ``-m slow`` has.
QUICK = ("ddp-dp", "fsdp-dp")


def _cases(quick: tuple[str, ...] = QUICK) -> list[Any]:
    found = []
    for name in FAMILIES:
        module = family(name)
        chosen = {case: module.CASES[case] for case in CHOSEN[name]} | getattr(module, "LINE_CASES", {})
        for case, setup in chosen.items():
            marks = [] if f"{name}-{case}" in quick else [pytest.mark.slow]
            found.append(pytest.param(name, setup, id=f"{name}-{case}", marks=marks))
    return found


every_case = pytest.mark.parametrize(("name", "setup"), _cases())


def _line(setup: Setup, directory: Any, **changes: Any) -> dict:
    return _block(setup, directory, population_size=_population(setup), members="line", **changes)


def _population(setup: Setup) -> int:
    """As many members as divide the batch of all ranks, at least the three that a trial takes."""
    dp = setup.members * setup.dp
    return 3 if dp == 3 else 4


def _searching(setup: Setup, directory: Any, **changes: Any) -> dict:
    strategy = {"name": "clan", "options": TRIAL}
    options = {"strategy": strategy, "total_steps": TOTAL, "genes": {"lr": {}}, "round_length": ROUND}
    return _line(setup, directory, **options | changes)


@every_case
def test_a_control_clan_is_the_engines_own_run_to_the_last_bit(name, setup, tmp_path):
    flat = _run(setup.world_size, _train, name, setup, None, 8)
    clan = _run(setup.world_size, _train, name, setup, _line(setup, tmp_path, strategy="control", total_steps=8), 8)
    for weights, expected in zip(clan, flat, strict=True):
        _assert_equal(weights, expected)


def _search(name: str, setup: Setup, block: dict) -> tuple[Any, ...]:
    run = family(name).start(setup, block)
    run.train(NUM_STEPS)
    memory = run.clan.population.memory
    return _leave((run.weights(), list(run.clan.progress.lineage), memory, run.clan.num_steps))


@every_case
def test_a_run_agrees_with_its_reference_through_rounds_and_turns(name, setup, tmp_path):
    if setup.dtype != "fp32":
        pytest.skip("the reference clan computes in float32: 16-bit engines are compared with themselves")
    if name == "deepspeed_moe":
        pytest.skip("the family's twin feeds members of one rank: experts route by the whole micro-batch")
    block = _searching(setup, tmp_path)
    clan = _run(setup.world_size, _search, name, setup, block)
    reference = _reference(name, setup, block)
    kinds = {phase.kind for record in reference.lineage for phase in record.phases}
    assert kinds == set(PhaseKind)
    expected = {n: p.detach() for n, p in reference.members[0].module.named_parameters()}
    for weights, lineage, memory, num_steps in clan:
        assert num_steps == NUM_STEPS and len(lineage) == len(reference.lineage)
        for record, theirs in zip(lineage, reference.lineage, strict=True):
            assert record.donors == theirs.donors and record.restored == theirs.restored
            # Losses of float32 sums in another order. The trial's highest rate, 13 times the clan's, is near the edge
            # of divergence, where such differences grow: up to 1.6 % was seen with Megatron's layers.
            is_trial = record.phases[0].kind is PhaseKind.COMPETITIVE
            assert record.losses == pytest.approx(theirs.losses, rel=3e-2 if is_trial else 2e-3)
        ours, wanted = memory["centre"]["lr"], reference.population.memory["centre"]["lr"]
        # A move is the quotient of differences of those losses.
        assert abs(ours - wanted) < 0.05
        assert _difference(weights, expected) < 0.02 * max(tensor.abs().max().item() for tensor in expected.values())
    assert abs(wanted - math.log(0.7)) > 0.1  # otherwise there was nothing to agree on


def _reference(name: str, setup: Setup, block: dict) -> ReferenceClan:
    module, size = family(name), block["population_size"]
    train, valid = module.datasets()
    genes = tuple(build_gene(n, GeneConfig(**g), found=setup.lr) for n, g in block["genes"].items())
    facts = RunFacts(size, genes, 0, ROUND, duty_cycle=0.1, total_steps=TOTAL)
    dp = setup.members * setup.dp
    kinds = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=setup.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01),
        "sgd": lambda p: torch.optim.SGD(p, lr=setup.lr, momentum=0.9),
    }
    clan = ReferenceClan(
        module.twin(),
        strategy=build("clan", facts, TRIAL),
        optimizer=kinds[setup.optimizer],
        loss_fn=module.twin_loss,
        batch=_Slices(train, module.MICRO * dp * setup.accumulation, size),
        eval_batches=_window(valid, block["fitness"]),
        clip=setup.clip,
        members="line",
    )
    clan.run(NUM_STEPS)
    return clan


class _Slices:
    """A member's part of the step's whole batch; in a common phase, the parts one after the other."""

    def __init__(self, dataset: Any, batch_size: int, size: int) -> None:
        self._dataset, self._batch_size, self._size = dataset, batch_size, size

    def __call__(self, step: int, member: int, micro: int, plan: Any) -> Any:
        sampler = ClanBatchSampler(
            len(self._dataset),
            seed=0,
            micro_batch_size=self._batch_size,
            dp_size=1,
            dp_rank=0,
            member=0,
            population_size=1,
            plan=lambda _: type(plan)(False, 1, 1),
        )
        sampler.load_state_dict({"step": step})
        share = self._batch_size // self._size
        place = micro if plan.is_common else member
        indices = next(iter(sampler))[place * share : (place + 1) * share]
        return torch.utils.data.default_collate([self._dataset[index] for index in indices])


def _stop_and_resume(name: str, setup: Setup, block: dict, stops: list[int], num_steps: int) -> list[Any]:
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
            run = module.start(setup, {**own, "checkpoint": {"resume": str(run.clan.recorder.run_dir)}})
        run.train(num_steps)
        seen.append((run.weights(), [record.losses for record in run.clan.progress.lineage]))
        run.clan.rounds.finish()
        run.clan.detach()
    return _leave(seen)


@pytest.mark.timeout(400)  # nine launches of an engine
@pytest.mark.parametrize(("name", "setup"), _cases(quick=("ddp-dp",)))
def test_a_run_that_stopped_anywhere_goes_on_as_if_it_had_not(name, setup, tmp_path):
    """Inside a round with a perturbed rate and decay, at a round's end, inside a trial's first turn."""
    block = _searching(setup, tmp_path, genes={"lr": {}, "weight_decay": {}} if setup.optimizer == "adamw" else ["lr"])
    # The family's own tolerance is for the few steps of the other resume; here up to 33 follow.
    tolerance = 10 * getattr(family(name), "RESUME_TOLERANCE", 0.0)
    stops = [3, 5, 12, 33]
    ranks = _run(setup.world_size, _stop_and_resume, name, setup, block, stops, 36, timeout_s=360.0)
    for (whole, losses), *resumed in ranks:
        for weights, theirs in resumed:
            assert _difference(weights, whole) <= tolerance
            assert len(theirs) == len(losses)
            assert tolerance or theirs == losses


class _Collectives(TorchDispatchMode):
    """Counts the calls of torch's collectives by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def _collectives(name: str, setup: Setup, block: dict | None) -> dict[str, int]:
    run = family(name).start(setup, block)
    run.train(1)
    with _Collectives() as seen:
        run.train(3)
    return _leave(dict(seen.counts))


@every_case
def test_a_step_has_exactly_the_engines_own_collectives(name, setup, tmp_path):
    plain = _run(setup.world_size, _collectives, name, setup, None)
    clan = _run(setup.world_size, _collectives, name, setup, _searching(setup, tmp_path))
    if name == "megatron" and setup.pp > 1:
        # All stages of a pipeline get the training loss, which only the last one has: one number a step.
        assert [counts.pop("c10d::broadcast_") for counts in clan] == [2] * setup.world_size
    assert clan == plain and any(plain[0].values())
