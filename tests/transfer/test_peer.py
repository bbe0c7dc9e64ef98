"""Clones on real engines, which train on as their donors do; digests, and a snapshot to go back to."""

from __future__ import annotations

import re

import pytest
import torch

from clantune_scale.distributed import world
from clantune_scale.distributed.world import ClanGroups
from clantune_scale.runtime.weight_averages import WeightEma
from clantune_scale.transfer import MemberState, Snapshot, transfer
from clantune_scale.transfer.state import bytes_digest, state_digest
from tests.backends.small_runs import batch, ds_config, flat_weights, in_member_worlds, member_engine
from tests.ranks import RankError, run_ranks


def _train(engine, steps, rank, lr=None):
    for step in steps:
        if lr is not None:
            engine.basic_optimizer.param_groups[0]["lr"] = lr
        for micro in range(engine.gradient_accumulation_steps()):
            loss = engine(*batch(step, micro, rank))
            engine.backward(loss)
            engine.step()


def _clone_then_train(rank, config):
    clan, backend = member_engine(config, 2)
    groups, engine = ClanGroups(clan, "cpu"), backend.engine
    member_rank = clan.at.member_rank
    uses_ema = WeightEma(backend.masters, backend.refresh)
    _train(engine, range(3), rank, lr=1e-2 * (1 + clan.member))
    uses_ema.update(3, 5)
    state = backend.state()
    state.tensors += [(f"average.{i}", tensor) for i, tensor in enumerate(uses_ema.tensors)]
    before, before_digest = flat_weights(engine), state_digest(state)
    report = transfer(state, [1, 1], clan.replica_group, groups.replica_group_for, bucket_bytes=1000)
    cloned, cloned_digest = flat_weights(engine), state_digest(state)
    _train(engine, range(3, 7), member_rank, lr=5e-3)
    return before, before_digest, cloned, cloned_digest, flat_weights(engine), report.received_bytes, state.num_bytes


@pytest.mark.parametrize(
    ("dtype", "stage"),
    [
        pytest.param(dtype, stage, marks=[] if (dtype, stage) in (("fp32", 1), ("bf16", 3)) else pytest.mark.slow)
        for dtype in ("fp32", "bf16")
        for stage in (0, 1, 2, 3)
    ],
)
def test_a_clone_trains_on_exactly_as_its_donor(stage, dtype):
    config = ds_config(stage, dtype=dtype, accumulation=2, clip=0.5)
    results = run_ranks(4, in_member_worlds, _clone_then_train, config)
    for rank, donor_rank in ((0, 2), (1, 3)):
        before, _, cloned, cloned_digest, after, received, num_bytes = results[rank]
        donor_before, donor_digest, donor_cloned, donor_cloned_digest, donor_after, sent, _ = results[donor_rank]
        assert not torch.equal(before, donor_before)
        assert torch.equal(donor_cloned, donor_before) and donor_cloned_digest == donor_digest
        assert torch.equal(cloned, donor_before) and cloned_digest == donor_digest
        assert torch.equal(after, donor_after) and not torch.equal(after, cloned)
        assert (received, sent) == (num_bytes, 0)


def _run_alone(function, *args):
    result = function(0, *args)
    world.current().replica_group.gather_json(None)
    return result


def _corrupt_on_arrival(rank):
    clan = world.join(2, timeout_s=30)
    state = MemberState(
        [("a", torch.full((100,), float(clan.member)))], {"optimizer": {}}, lambda s: None, lambda: None
    )
    groups = ClanGroups(clan, "cpu")

    class Flipping:
        """A link that flips one bit of what it delivers."""

        def __init__(self, group):
            self.group = group

        def send(self, *args):
            return self.group.send(*args)

        def recv(self, tensors, *args):
            self.group.recv(tensors, *args).wait()
            tensors[0][13] ^= 4
            return self

        def wait(self):
            return None

    transfer(state, [0, 0], clan.replica_group, lambda device: Flipping(groups.replica_group_for(device)))


def test_one_flipped_bit_on_the_way_is_found():
    with pytest.raises(
        RankError, match=r"member 1 \(rank 1\) did not get member 0's state in two attempts \(buckets \[0\] of 1 differ"
    ):
        run_ranks(2, _run_alone, _corrupt_on_arrival)


def _different_layouts(rank):
    clan = world.join(2, timeout_s=30)
    state = MemberState([("a", torch.zeros(4 + clan.member))], {"optimizer": {}}, lambda s: None, lambda: None)
    transfer(state, [0, 0], clan.replica_group, ClanGroups(clan, "cpu").replica_group_for)


def test_states_that_are_laid_out_differently_are_refused_before_a_byte_moves():
    expected = re.escape("member 1's state is laid out differently from member 0's: ['a', [5], 'torch.float32'] "
                         "against ['a', [4], 'torch.float32']")  # fmt: skip
    with pytest.raises(RankError, match=expected):
        run_ranks(2, _run_alone, _different_layouts)


def test_a_digest_sees_every_single_bit_and_a_swap():
    buffer = torch.arange(64, dtype=torch.uint8)
    digest = bytes_digest(buffer)
    for position in range(64):
        for bit in range(8):
            flipped = buffer.clone()
            flipped[position] ^= 1 << bit
            assert bytes_digest(flipped) != digest
    assert bytes_digest(torch.cat([buffer[8:16], buffer[:8], buffer[16:]])) != digest


def test_pieces_cover_every_byte_once_and_alias_live_memory():
    tensors = [("a", torch.zeros(10)), ("empty", torch.zeros(0)), ("b", torch.zeros(3, 5, dtype=torch.bfloat16))]
    state = MemberState(tensors, {}, lambda s: None, lambda: None)
    buckets = list(state.pieces(16))
    assert [sum(piece.numel() for piece in bucket) for bucket in buckets] == [16, 16, 16, 16, 6]
    for bucket in buckets:
        for piece in bucket:
            piece.fill_(1)
    assert all(bool((tensor.view(-1).view(torch.uint8) == 1).all()) for _, tensor in tensors if tensor.numel())


def _roll_back(rank, config):
    _, backend = member_engine(config, 1)
    engine = backend.engine
    fresh = Snapshot(backend.state())
    _train(engine, range(2), rank)
    trained, kept = flat_weights(engine), Snapshot(backend.state())
    _train(engine, range(2, 4), rank)
    first = flat_weights(engine)
    kept.restore(backend.state)
    restored = flat_weights(engine)
    _train(engine, range(2, 4), rank)
    second = flat_weights(engine)
    fresh.restore(backend.state)
    _train(engine, range(2), rank)
    return trained, restored, first, second, flat_weights(engine)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_snapshot_undoes_what_training_did_to_the_last_bit(stage):
    results = run_ranks(2, in_member_worlds, _roll_back, ds_config(stage, dtype="bf16" if stage else "fp32", clip=0.5))
    for trained, restored, first, second, from_the_start in results:
        assert torch.equal(restored, trained) and not torch.equal(first, trained)
        assert torch.equal(second, first)
        # Taken before the optimizer had any state: it starts over as if new.
        assert torch.equal(from_the_start, trained)
