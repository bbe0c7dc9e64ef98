from __future__ import annotations

import functools
import itertools
import operator
from dataclasses import replace

import pytest
import torch
from torch.utils.data import Dataset

from clantune_scale.core.rounds import Phase, PhaseKind
from clantune_scale.data.sampler import ClanBatchSampler, ClanDataLoader, StepPlan
from clantune_scale.errors import ConfigError

N, POPULATION, DP, MICRO = 61, 2, 2, 3
COOPERATE = StepPlan(is_common=False, num_micro_batches=2, clan_micro_batches=2)
COMPETE = StepPlan(is_common=True, num_micro_batches=2, clan_micro_batches=2)


def cooperative(step: int) -> StepPlan:
    return COOPERATE


def alternating(step: int) -> StepPlan:
    """Four cooperative steps, then two competitive ones."""
    return COMPETE if step % 6 >= 4 else COOPERATE


def sampler(member=0, dp_rank=0, plan=cooperative, **changes) -> ClanBatchSampler:
    settings = {"seed": 5, "micro_batch_size": MICRO, "dp_size": DP, "population_size": POPULATION}
    return ClanBatchSampler(
        changes.pop("num_samples", N), member=member, dp_rank=dp_rank, plan=plan, **settings | changes
    )


def take(count: int, of) -> list:
    return list(itertools.islice(of, count))


def clan(plan) -> dict[tuple[int, int], ClanBatchSampler]:
    return {(m, d): sampler(m, d, plan) for m in range(POPULATION) for d in range(DP)}


class Numbers(Dataset):
    """Sample i is the number i."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> int:
        return index


def test_a_cooperating_clan_reads_what_flat_data_parallelism_reads():
    world = POPULATION * DP
    for (member, dp_rank), own in clan(cooperative).items():
        flat = sampler(0, member * DP + dp_rank, population_size=1, dp_size=world)
        assert take(40, own) == take(40, flat)


def test_a_cooperating_clan_reads_every_sample_once_per_epoch():
    streams = [iter(own) for own in clan(cooperative).values()]
    # 15 micro-batches of 4 ranks x 3 are 180 positions: two epochs of 61 and 58 of the third.
    read = [index for _ in range(15) for stream in streams for index in next(stream)]
    counts = [read.count(index) for index in range(N)]
    assert set(counts) == {2, 3}
    assert counts.count(3) == 180 - 2 * N


def test_competing_members_read_the_same_and_split_it_over_their_ranks():
    streams = {key: take(12, own) for key, own in clan(alternating).items()}
    for dp_rank in range(DP):
        assert streams[0, dp_rank][8:12] == streams[1, dp_rank][8:12]
        assert streams[0, dp_rank][:8] != streams[1, dp_rank][:8]
    inside = [index for dp_rank in range(DP) for batch in streams[0, dp_rank][8:12] for index in batch]
    assert len(set(inside)) == len(inside) == 4 * DP * MICRO


def test_cooperation_goes_on_after_the_competition_without_gap_or_overlap():
    unshuffled = {key: sampler(*key, plan=alternating, shuffle=False, num_samples=1000) for key in clan(alternating)}
    read = {key: take(16, own) for key, own in unshuffled.items()}
    cooperative_positions = 4 * 2 * POPULATION * DP * MICRO
    competitive_positions = 2 * 2 * DP * MICRO
    assert read[0, 0][8][0] == cooperative_positions
    assert read[0, 0][12][0] == cooperative_positions + competitive_positions


def test_members_with_different_numbers_of_micro_batches_leave_the_competition_together():
    def plan_of(own: int):
        return lambda step: StepPlan(True, own, 3) if step == 0 else COOPERATE

    short = take(2, sampler(0, plan=plan_of(1), shuffle=False))
    long = take(4, sampler(1, plan=plan_of(3), shuffle=False))
    assert short[0] == long[0]
    assert short[1][0] == 3 * DP * MICRO
    assert long[3][0] == short[1][0] + DP * MICRO  # member 1's share of the same step


ALONE = Phase(PhaseKind.COMPETITIVE, 1)


def teamed(*teams: int, counts: tuple[int, ...], **changes):
    """[members] plans of a competitive step, then cooperation."""
    phase = replace(ALONE, teams=teams or None, **changes)
    first = [StepPlan.of(phase, counts, member) for member in range(len(counts))]
    return [lambda step, own=own: own if step == 0 else COOPERATE for own in first]


def test_plans_follow_from_the_phase_and_everyones_micro_batches():
    cooperate = Phase(PhaseKind.COOPERATIVE, 1, batch_factor=2)
    assert StepPlan.of(cooperate, (3, 3), 1) == StepPlan(False, 6, 6)
    assert [StepPlan.of(ALONE, (1, 3), member) for member in (0, 1)] == [StepPlan(True, 1, 3), StepPlan(True, 3, 3)]
    phase = replace(ALONE, teams=(5, 2, 5, 5), batch_factor=2)
    # Team 5 reads 2 x 2 micro-batches for each of its three members, team 2 reads 2 x 4 for its one.
    assert [StepPlan.of(phase, (2, 4, 2, 2), member) for member in range(4)] == [
        StepPlan(True, 4, 12, 0, 3),
        StepPlan(True, 8, 12, 0, 1),
        StepPlan(True, 4, 12, 1, 3),
        StepPlan(True, 4, 12, 2, 3),
    ]


@pytest.mark.parametrize("batch_factor", [1, 2])
def test_a_team_shares_out_what_its_rivals_read_from_the_same_place(batch_factor):
    plans = teamed(0, 0, 1, 0, counts=(2, 2, 2, 2), batch_factor=batch_factor)
    number = 2 * batch_factor
    read = {
        (member, dp_rank): [
            index
            for batch in take(
                number, sampler(member, dp_rank, plans[member], population_size=4, num_samples=1000, shuffle=False)
            )
            for index in batch
        ]
        for member in range(4)
        for dp_rank in range(DP)
    }
    ours = [index for member in (0, 1, 3) for dp_rank in range(DP) for index in read[member, dp_rank]]
    theirs = [index for dp_rank in range(DP) for index in read[2, dp_rank]]
    assert sorted(ours) == list(range(3 * number * DP * MICRO))  # disjoint, without a gap
    assert sorted(theirs) == list(range(number * DP * MICRO))  # the same, as far as it gets


def test_all_ranks_leave_a_step_in_teams_at_the_same_place():
    plans = teamed(0, 1, 0, 0, counts=(1, 2, 1, 1))
    cursors = set()
    for member, dp_rank in itertools.product(range(4), range(DP)):
        own = sampler(member, dp_rank, plans[member], population_size=4)
        for _ in range(plans[member](0).num_micro_batches):
            own.consume()
        cursors.add((own.position.step, own.position.cursor))
    assert cursors == {(1, 3 * DP * MICRO)}  # the three members of team 0 read more than the two micro-batches of 1


def test_one_team_of_all_reads_what_a_cooperating_clan_reads():
    plans = teamed(0, 0, counts=(2, 2))
    for member, dp_rank in clan(cooperative):
        assert take(8, sampler(member, dp_rank, plans[member])) == take(8, sampler(member, dp_rank, cooperative))


def test_the_order_follows_the_seed_and_changes_with_the_epoch():
    first, again, other = (take(40, sampler(seed=s)) for s in (5, 5, 6))
    assert first == again != other
    whole = ClanBatchSampler(
        8, seed=1, micro_batch_size=8, dp_size=1, dp_rank=0, member=0, population_size=1, plan=cooperative
    )
    epochs = take(3, whole)
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert take(2, sampler(shuffle=False))[0] == [0, 1, 2]


@pytest.mark.parametrize("state", [{"step": 9, "cursor": 192}, {"step": 9}], ids=["whole", "step alone"])
def test_a_state_resumes_where_training_was_and_not_where_prefetching_was(state):
    loader = ClanDataLoader(Numbers(), sampler(plan=alternating))
    endless = itertools.chain.from_iterable(itertools.repeat(loader))
    seen = [batch.tolist() for batch in take(18, endless)]
    assert loader.state_dict() == {"step": 9, "cursor": 192}
    following = [batch.tolist() for batch in take(10, endless)]

    resumed = ClanDataLoader(Numbers(), sampler(plan=alternating))
    resumed.load_state_dict(state)
    endless = itertools.chain.from_iterable(itertools.repeat(resumed))
    assert [batch.tolist() for batch in take(10, endless)] == following
    assert seen + following == take(28, sampler(plan=alternating))


def test_a_state_inside_a_step_is_that_of_its_start():
    own = sampler()
    own.consume()
    assert own.state_dict() == {"step": 0, "cursor": 0}
    own.consume()
    assert own.state_dict() == {"step": 1, "cursor": 2 * POPULATION * DP * MICRO}


def test_one_iteration_is_one_epoch_and_the_next_goes_on():
    loader = ClanDataLoader(Numbers(), sampler())
    assert len(loader) == N // (POPULATION * DP * MICRO) == 5
    epochs = [[batch.tolist() for batch in loader] for _ in range(3)]
    assert [len(epoch) for epoch in epochs] == [5, 5, 5]
    assert functools.reduce(operator.iadd, epochs, []) == take(15, sampler())


def test_prefetching_workers_follow_phase_changes_and_replans():
    micro_batches = [2]

    def moving(step: int) -> StepPlan:
        plan = alternating(step)
        return StepPlan(plan.is_common, micro_batches[0], micro_batches[0]) if step >= 7 else plan

    loader = ClanDataLoader(Numbers(), sampler(plan=moving), num_workers=2, prefetch_factor=4)
    endless = itertools.chain.from_iterable(itertools.repeat(loader))
    seen = [batch.tolist() for batch in take(14, endless)]  # steps 0 to 6, with a competition at 4 and 5
    micro_batches[0] = 3  # an accumulation gene moves, while batches of the old plan wait in the workers
    loader.replan()
    seen += [batch.tolist() for batch in take(20, endless)]
    assert seen == take(34, sampler(plan=moving))
    assert seen[14:] != take(34, sampler(plan=alternating))[14:]


def test_the_loader_leaves_the_global_random_stream_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    next(iter(ClanDataLoader(Numbers(), sampler())))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("num_samples", [0, 11])
def test_a_dataset_too_small_for_the_clan_is_refused_with_the_arithmetic(num_samples):
    with pytest.raises(
        ConfigError, match=rf"has {num_samples} samples.*population_size\(2\) x dp\(2\) x micro_batch\(3\) = 12"
    ):
        sampler(num_samples=num_samples)


def test_progress_is_what_training_has_used():
    """Counted micro-batches where a loader counts them, steps where none does; what is held ahead is drawn again."""
    own = sampler()
    assert own.progress(7) == {"step": 7}
    for _ in range(2 * 3):
        own.consume()
    place = {"step": 3, "cursor": 3 * 2 * POPULATION * DP * MICRO}
    assert own.progress(3) == own.state_dict() == place
    held = sampler(plan=lambda step: StepPlan(is_common=False, num_micro_batches=1, clan_micro_batches=1))
    for _ in range(4):
        held.consume()
    assert held.progress(4) == {"step": 4, "cursor": 4 * POPULATION * DP * MICRO}
    assert held.progress(3) == {"step": 3, "cursor": 3 * POPULATION * DP * MICRO}
    own.load_state_dict({"step": 5})
    assert own.progress(9) == {"step": 9}
