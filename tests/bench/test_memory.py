"""Counting live bytes, and what a clan on the line adds to an engine's peak."""

from __future__ import annotations

import pytest
import torch

from clantune_scale.bench import memory
from clantune_scale.bench.live_bytes import LiveBytes
from clantune_scale.bench.memory import ENGINES, STORES, MemorySetting, Peaks, main, measure, planned_bytes, rows


class Copies:
    """Makes tensors that belong into host memory."""

    def make(self) -> torch.Tensor:
        return torch.zeros(100)


def test_bytes_live_as_long_as_the_last_view_of_them():
    with LiveBytes() as counted:
        whole = torch.zeros(1000)
        view = whole.view(10, 100)[2:]
        assert counted.now["device"] == 4000
        del whole
        assert counted.now["device"] == 4000
        view.add_(1)  # in place: nothing new
        assert counted.now["device"] == counted.peak["device"] == 4000
        del view
        assert counted.now["device"] == 0 and counted.peak["device"] == 4000
        counted.restart()
        (torch.zeros(10) + torch.ones(10)).sum()
        assert counted.peak["device"] == 3 * 40 + 0 or counted.peak["device"] == 3 * 40 + 4


def test_host_memory_is_told_by_its_maker_and_resized_storages_count_anew():
    with LiveBytes() as counted, counted.resizing():
        undo = counted.on_host(Copies, "make")
        copies = Copies().make()
        undo()
        device = Copies().make()
        assert counted.now == {"host": 400, "device": 400}
        device.untyped_storage().resize_(0)
        assert counted.now["device"] == 0
        device.untyped_storage().resize_(800)
        assert counted.now["device"] == 800
        del copies
        assert counted.now["host"] == 0
    assert torch.UntypedStorage.resize_.__name__ == "resize_"


def test_gradients_of_a_backward_pass_are_seen():
    with LiveBytes() as counted:
        weight = torch.zeros(100, requires_grad=True)
        (weight * 2).sum().backward()
        assert counted.now["device"] == 800


@pytest.mark.parametrize("engine", ENGINES)
def test_what_the_plan_says_is_four_shards_on_the_device_and_none_with_the_host(engine):
    setting = MemorySetting(ranks=2, width=8, depth=1)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in memory.Blocks(8, 1).parameters())
    shard = 4 * size // (1 if engine == "ddp" else 2)
    gradients = shard if engine in ("zero2", "zero3") else 4 * size
    # DeepSpeed's gradients are gone when the centre is copied.
    wanted = 4 * shard if engine in ("ddp", "fsdp2") else 3 * shard + max(0, shard - gradients)
    assert planned_bytes(setting, engine, "device") == pytest.approx(wanted, abs=64)
    assert planned_bytes(setting, engine, "host") == 0


def test_a_row_has_the_ratio_and_what_was_planned():
    row = rows([Peaks("zero1", "device", 40_000_000, 50_000_000, 3_000_000, 9_900_000)])
    assert row == "| zero1 | device | 40.00 | 50.00 | 1.250 | 10.00 | 9.90 | 3.00 |"


@pytest.mark.slow
@pytest.mark.timeout(1200)  # fifteen launches
@pytest.mark.parametrize("engine", ENGINES)
def test_a_clan_adds_what_the_plan_says_and_with_the_host_hardly_anything(engine):
    for one in measure(MemorySetting(), engine, STORES):
        if one.store == "host":
            assert one.ratio <= 1.02
        # Pieces of a point, and activations that are gone when members are measured.
        assert abs(one.clan - one.plain - one.planned) <= 0.05 * one.plain


def test_the_command_refuses_an_engine_that_it_does_not_know(capsys):
    with pytest.raises(SystemExit):
        main(["--engines", "megatron"])
    assert "invalid choice: 'megatron'" in capsys.readouterr().err
