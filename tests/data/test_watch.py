"""What is watched of training: the loss's running mean, and the data that members see, by digest."""

from __future__ import annotations

import time
import warnings

import pytest
import torch

from clantune_scale.core.rounds import Phase, PhaseKind
from clantune_scale.data.watch import BatchWatch, LossMeter
from clantune_scale.distributed import world
from tests.ranks import run_ranks

COOPERATE, COMPETE = PhaseKind.COOPERATIVE, PhaseKind.COMPETITIVE


def test_the_meter_means_the_losses_since_it_was_last_read():
    meter = LossMeter()
    for loss in (torch.tensor(1.0, requires_grad=True), torch.tensor([3.0]), torch.tensor(5.0, dtype=torch.bfloat16)):
        meter.add(loss)
    # What is not one number is no loss.
    meter.add(torch.zeros(2)), meter.add(None)
    assert meter.read(3)[0] == 3.0
    meter.add(torch.tensor(8.0))
    assert meter.read(1)[0] == 8.0
    assert meter.read(1)[0] is None


def test_the_meter_counts_a_round_through_all_readings_and_from_where_a_resumed_one_was():
    meter = LossMeter()
    for loss in (1.0, 2.0, 6.0):
        meter.add(torch.tensor(loss))
        meter.read(1)
    assert meter.round_losses == (9.0, 3)
    meter.begin_round()
    assert meter.round_losses == (0.0, 0)
    again = LossMeter()
    again.begin_round(9.0, 3)
    again.add(torch.tensor(0.5))
    assert again.round_losses == (9.5, 4)


def test_the_meter_divides_the_time_among_the_steps():
    meter = LossMeter()
    start = time.perf_counter()
    time.sleep(0.05)
    seconds = meter.read(5)[1]
    assert 0.01 <= seconds <= (time.perf_counter() - start) / 5
    assert meter.read(5)[1] < seconds


class FakeColumn:
    """Two members: this one, and one that saw ``others``."""

    size = 2

    def __init__(self, others: list) -> None:
        self.others = others

    def gather_json(self, value: list) -> list[list]:
        return [value, self.others]


def seen_by(phases: list[tuple[PhaseKind, list]]) -> list:
    """What a watch reports of these phases' first batches."""
    recorded: list = []
    replica_group = FakeColumn([])
    replica_group.gather_json = lambda value: recorded.extend(value) or [value, value]
    watch = BatchWatch(replica_group)
    for kind, args in phases:
        watch.begin(Phase(kind, 1))
        watch.on_batch(*args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        watch.compare()
    return recorded


def batch_of(value: float) -> list:
    """Arguments of a forward pass with tensors in every kind of nest."""
    tensor = torch.full((2, 3), value)
    return [(tensor, [tensor.int(), "text"]), {"mask": {"inner": tensor > 0}, "empty": torch.zeros(0)}]


@pytest.mark.parametrize(
    "phases, complaint",
    [
        ([(COOPERATE, 1.0, 2.0), (COMPETE, 3.0, 3.0)], None),
        ([(COOPERATE, 1.0, 1.0)], r"members \[0, 1\] train on the same batch while they cooperate"),
        ([(COMPETE, 1.0, 2.0)], "members train on different data while they compete"),
        ([(COOPERATE, 1.0, 2.0), (COMPETE, 2.0, 1.0)], "members train on different data while they compete"),
    ],
)
def test_data_that_does_not_follow_the_phase_is_complained_of(phases, complaint):
    watch = BatchWatch(FakeColumn(seen_by([(kind, batch_of(other)) for kind, _, other in phases])))
    for kind, mine, _ in phases:
        watch.begin(Phase(kind, 1))
        watch.on_batch(*batch_of(mine))
    if complaint is None:
        assert watch.compare() == []
        return
    with pytest.warns(UserWarning, match=complaint + r".*engine\.clan\.sampler\(\)"):
        (said,) = watch.compare()
    assert "Pass training_data to initialize()" in said


@pytest.mark.parametrize("place", ["args", "nested in args", "kwargs"])
def test_one_element_anywhere_makes_batches_different(place):
    mine, other = batch_of(1.0), batch_of(1.0)
    changed = {"args": other[0][0], "nested in args": other[0][1][0], "kwargs": other[1]["mask"]["inner"]}[place]
    changed[1, 2] = 0
    watch = BatchWatch(FakeColumn(seen_by([(COMPETE, other)])))
    watch.begin(Phase(COMPETE, 1))
    watch.on_batch(*mine)
    with pytest.warns(UserWarning, match="different data"):
        watch.compare()


def test_only_the_first_batch_of_a_phase_counts_and_each_complaint_is_made_once():
    watch = BatchWatch(FakeColumn(seen_by([(COMPETE, batch_of(1.0))])))
    watch.on_batch(*batch_of(9.0))  # no phase has begun
    watch.begin(Phase(COMPETE, 1))
    watch.on_batch(*batch_of(1.0))
    watch.on_batch(*batch_of(2.0))
    assert watch.compare() == []
    for number in range(2):
        watch.begin(Phase(COMPETE, 1))
        watch.on_batch(*batch_of(2.0))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert len(watch.compare()) == len(caught) == 1 - number


def _watch_in_column():
    clan = world.join(3, timeout_s=30)
    watch = BatchWatch(clan.replica_group)
    said = []
    for mine in ((0.0, 1.0, 2.0), (0.0, 5.0, 5.0)):
        watch.begin(Phase(COOPERATE, 1))
        watch.on_batch((torch.full((4,), mine[clan.member]),), {})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            said.append(watch.compare())
    return said


def test_every_rank_of_the_column_hears_the_same_members_named():
    for first, second in run_ranks(3, _watch_in_column):
        assert first == []
        (complaint,) = second
        assert complaint.startswith("members [1, 2] train on the same batch while they cooperate")
