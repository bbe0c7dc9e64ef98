"""What is predicted is what is sent: exact in elements and widths, for every ZeRO stage."""

from __future__ import annotations

from collections import Counter

import pytest

from clantune_scale.config.schema import ClanConfig
from clantune_scale.core.genome import Gene
from clantune_scale.core.rounds import PhaseKind
from clantune_scale.planning.budget import Size, forecast
from clantune_scale.planning.memory import rank_memory, state_bytes
from clantune_scale.planning.traffic import (
    Collective,
    clone_traffic,
    crossing_bytes,
    drift_traffic,
    evaluation_traffic,
    inside_bytes,
    mean_round_bytes,
    round_end_traffic,
    step_traffic,
)
from tests.backends.small_runs import ds_config, in_member_worlds
from tests.planning import counted
from tests.ranks import run_ranks
from tests.small_clans import clan_config

GENES = {"lr": {}, "dropout": {"initial": 0.1}}


def _zero_3(**more) -> dict:
    return {"zero_optimization": {"stage": 3, **more}}


CASES = {
    "0": (0, "fp32", {}),
    "1": (1, "fp32", {}),
    "2": (2, "fp32", {}),
    "3": (3, "fp32", _zero_3(stage3_param_persistence_threshold=0)),
    "3, all kept whole": (3, "fp32", _zero_3(stage3_param_persistence_threshold=100_000)),
    "0 in bf16": (0, "bf16", {}),
    "2 in bf16": (2, "bf16", {}),
    "3 in bf16": (3, "bf16", _zero_3(stage3_param_persistence_threshold=0)),
}


def _forecast(config: dict, sizes: list[int], *, world_size: int = 4, num_steps: int = 18):
    block = ClanConfig.model_validate(config["clantune"])
    genes = (
        Gene("lr", relative=True),
        Gene("dropout", kind="specialized", scale="linear", bounds=(0, 0.5), initial=0.1),
    )[: len(block.genes)]
    rest = {key: value for key, value in config.items() if key != "clantune"}
    how = {"world_size": world_size, "num_steps": num_steps, "hardware": None, "measured": None}
    return forecast(rest, block, genes, Size(tuple(sizes)), **how)


def _elements(collectives: list[Collective]) -> dict[counted.Key, int]:
    total: Counter[counted.Key] = Counter()
    for one in collectives:
        if one.elements > counted.FEW[one.width]:
            total[one.operation, one.scope, one.width] += one.elements
    return dict(total)


#: Those that a run without ``-m slow`` has: one that reduces whole gradients, one that shards weights.
QUICK = ("1", "3")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in QUICK else [pytest.mark.slow]) for case in CASES]
)
def test_what_a_clan_sends_is_what_was_predicted(case, tmp_path):
    stage, dtype, extra = CASES[case]
    config = clan_config(
        tmp_path,
        ds_config(stage, dtype=dtype, accumulation=2, clip=0.5) | extra,
        genes=GENES,
        duty_cycle=0.5,
        round_length=counted.ROUND,
        strategy={"name": "clan", "options": {"growth": 0.0}},
        fitness={"num_samples": 64, "batch_size": 1},
    )
    results = run_ranks(4, in_member_worlds, counted.job, config)
    predicted = _forecast(config, results[0]["sizes"])
    job = predicted.job
    assert (job.population_size, job.dp, job.accumulation) == (2, 2, 2)
    for rank, found in enumerate(results):
        if stage == 3 and rank % 2 == 1:
            # The plan is of a member's first rank. The second has the padding: it reduces one element less per
            # micro-batch and reduction down the column (3 elements of `shift` over 2 ranks).
            for kind in ("cooperative", "cooperative_last", "cooperative_last_round_end"):
                found[kind]["all_reduce", "replica_group", job.width] += job.accumulation
        assert found["cooperative"] == _elements([*step_traffic(job)])
        assert found["cooperative_last"] == _elements([*step_traffic(job, has_diagnostics=True)])
        assert found["competitive"] == _elements([*step_traffic(job, cooperates=False)])
        at_end = [
            *step_traffic(job, has_diagnostics=True),
            *evaluation_traffic(job, averaged=True),
            *drift_traffic(job),
        ]
        donors = found["donors"][-1]  # the third round cooperates throughout
        clone, *refresh = clone_traffic(job)
        is_donor = donors.count(found["member"]) > 1
        receives = donors[found["member"]] != found["member"]
        at_end += [clone] * is_donor + refresh * receives
        assert found["cooperative_last_round_end"] == _elements(at_end)
        assert found["state_bytes"] == state_bytes(job)
        assert rank_memory(job).host == found["kept_bytes"] and found["averages"] is job.uses_ema is True
    assert any(found["donors"][-1] != (0, 1) for found in results), "nobody was cloned, and nothing was seen of it"


@pytest.mark.parametrize("case", [pytest.param("0", marks=pytest.mark.slow), "2 in bf16", "3"])
def test_what_a_clan_on_the_line_sends_is_what_was_predicted(case, tmp_path):
    """A plain step, and at a round's end four points with their losses, and the weights' way to the best."""
    stage, dtype, extra = CASES[case]
    config = clan_config(
        tmp_path,
        ds_config(stage, dtype=dtype, accumulation=2, clip=0.5) | extra,
        members="line",
        population_size=4,
        round_length=counted.ROUND,
        strategy={"name": "clan", "options": {"growth": 0.0}},
        fitness={"num_samples": 64, "batch_size": 1},
    )
    results = run_ranks(2, in_member_worlds, counted.job, config)
    one = _forecast(config, results[0]["sizes"], world_size=2)
    job = one.job
    assert (job.population_size, job.dp, job.points, job.accumulation) == (1, 2, 4, 2)
    assert list(step_traffic(job)) == list(step_traffic(job.without_clan()))
    for found in results:
        assert found["cooperative"] == _elements([*step_traffic(job)])
        at_end = [*step_traffic(job), *round_end_traffic(job, one.walk.rounds[2])]
        assert found["cooperative_last_round_end"] == _elements(at_end)
        assert found["kept_bytes"] == state_bytes(job)
        # The third round's end was the fourth's start.
        assert found["state_bytes"] == state_bytes(job) + one.memory.line
    assert list(clone_traffic(job)) == list(drift_traffic(job)) == []
    # All of it stays among the ranks of the one model.
    assert crossing_bytes(round_end_traffic(job), job) == 0 < inside_bytes(round_end_traffic(job), job)
    inside, crossing = mean_round_bytes(job, one.walk)
    steps = 18 * inside_bytes(step_traffic(job), job)
    ends = sum(inside_bytes(round_end_traffic(job, plan), job) for plan in one.walk.ended)
    assert (inside, crossing) == (pytest.approx((steps + ends) / 3), 0)


def test_each_turn_is_measured_and_sent_back():
    block = {"members": "line", "population_size": 4, "strategy": {"name": "clan", "options": {"trial_cost": 0.6}}}
    config = clan_config("runs", ds_config(1), total_steps=100, **block)
    one = _forecast(config, [1000], world_size=2, num_steps=100)
    trial = next(plan for plan in one.walk.rounds if plan.phases[0].kind is PhaseKind.COMPETITIVE)
    sent = list(round_end_traffic(one.job, trial))
    gathers = [part for part in sent if part.width == one.job.width]
    # The average goes into the model and out again, and then the next turn's start, or the best end.
    assert len(gathers) == 4 * 3 and len(sent) - len(gathers) == 4


def test_rings_send_by_their_length():
    config = clan_config("runs", ds_config(0), population_size=2)
    job = _forecast(config, [1000]).job
    reduce = Collective("all_reduce", "clan", 1000, 4)
    assert reduce.wire_bytes(job) == 2 * 3 / 4 * 4000
    assert crossing_bytes([reduce], job) == 6000 and inside_bytes([reduce], job) == 6000
    down = Collective("all_reduce", "replica_group", 500, 4)
    assert crossing_bytes([down], job) == 2 * (2 * 1 / 2 * 2000) and inside_bytes([down], job) == 0
    within = Collective("all_gather", "member", 1000, 4)
    assert crossing_bytes([within], job) == 0 and inside_bytes([within], job) == 2 * (1 / 2 * 4000)


def test_a_cooperative_step_sends_what_plain_data_parallelism_does_below_zero_3():
    for stage in (0, 1, 2):
        job = _forecast(clan_config("runs", ds_config(stage), population_size=2), [1000]).job
        plain = job.without_clan()
        ours = [one.payload_bytes for one in step_traffic(job) if one.scope == "clan"]
        theirs = [one.payload_bytes for one in step_traffic(plain) if one.operation == "all_reduce"]
        assert ours == theirs
