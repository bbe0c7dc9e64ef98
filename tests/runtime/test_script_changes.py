"""What a script changes under a clan: a checkpoint that it loads, the batch size, buffers that grow, more steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset

import clantune_scale
from clantune_scale.errors import ClanError, ConfigError
from clantune_scale.tracking import read_events
from tests.backends.small_runs import MICRO, ds_config, in_member_worlds
from tests.ranks import run_ranks
from tests.runtime.line.test_optimizers import Net, attach, data, train
from tests.small_clans import clan_config, start
from tests.small_clans import train as train_engine


def _adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


def _trained_before() -> tuple[dict, dict]:
    """The checkpoint of a run without a clan."""
    model = Net()
    optimizer = _adam(model)
    for batch in torch.utils.data.DataLoader(data(), 8):
        model(*batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())


def test_a_checkpoint_that_is_loaded_after_attaching_is_what_the_clan_begins_with(tmp_path):
    weights, moments = _trained_before()
    found = []
    for is_late in (False, True):
        model = Net()
        optimizer = _adam(model)

        def load(model=model, optimizer=optimizer):
            model.load_state_dict(weights)
            optimizer.load_state_dict(copy.deepcopy(moments))

        if not is_late:
            load()
        clan = attach(tmp_path / str(is_late), model, optimizer)
        if is_late:
            load()
        train(clan, model, [optimizer], [], 12)
        found.append((clan.fitness.mean.tolist(), torch.cat([p.detach().flatten() for p in model.parameters()])))
        with pytest.raises(ClanError, match="a checkpoint was loaded at step 12 of a clan that has trained"):
            load()
            train(clan, model, [optimizer], [], 13)
        clan.detach()
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


def test_steps_past_the_end_are_said_once_to_change_nothing(tmp_path):
    model = Net()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    clan = attach(tmp_path, model, optimizer, total_steps=10)
    train(clan, model, [optimizer], [], 10)
    at_end = model.out.weight.detach().clone()
    train(clan, model, [optimizer], [], 20)
    assert torch.equal(model.out.weight, at_end)
    warned = [event for event in read_events(clan.recorder.run_dir / "events.jsonl") if event["kind"] == "warning"]
    said = [event["message"] for event in warned if "past total_steps (10)" in event["message"]]
    assert len(said) == 1 and "these steps change nothing" in said[0]


@pytest.mark.parametrize("kind", ["epochs", "metric"])
def test_a_schedule_of_the_loops_own_is_resumed_where_it_was(kind, tmp_path):
    def run(directory, num_steps, **checkpoint):
        model = Net()
        optimizer = _adam(model)
        scheduler = (
            torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
            if kind == "epochs"
            else torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, factor=0.5)
        )
        saving = {"every_rounds": 1, "asynchronous": False} | checkpoint
        rounds = {"round_length": 4, "strategy": {"name": "clan", "options": {"growth": 0.0, "trial_cost": 0.0}}}
        clan = attach(directory, model, optimizer, checkpoint=saving, **rounds)
        begun, rates = clan.num_steps, {}
        for step in clan.steps(clan.loader(data()), until=num_steps):
            for batch in step:
                model(*batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            if clan.num_steps % 4 == 0:  # an epoch, which is also a round
                scheduler.step(*([] if kind == "epochs" else [1.0]))
            rates[clan.num_steps] = optimizer.param_groups[0]["lr"]
        clan.rounds.release()
        clan.detach()
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        return begun, rates, weights, str(clan.recorder.run_dir)

    _, whole, weights, _ = run(tmp_path / "whole", 32)
    assert len(set(whole.values())) >= 4
    *_, stopped = run(tmp_path / "parts", 21)
    begun, rest, resumed, _ = run(tmp_path / "parts", 32, resume=stopped)
    # The round ended with an epoch, whose rate was set after its last step.
    assert begun == 20 and rest == {step: rate for step, rate in whole.items() if step > begun}
    assert torch.equal(resumed, weights)


class Stream(IterableDataset):
    """Knows its length and has no index, as streams of shards do."""

    def __len__(self) -> int:
        return 64

    def __iter__(self) -> Any:
        return iter(data())


class Unindexed(torch.utils.data.Dataset):
    """Has the index of torch's base class, which only raises."""

    def __len__(self) -> int:
        return 64


@pytest.mark.parametrize("stream", [Stream(), Unindexed()], ids=["stream", "base class"])
def test_a_stream_with_a_length_is_refused_as_a_stream(stream, tmp_path):
    model = Net()
    with pytest.raises(ConfigError, match="eval_data is a .* without a length or an index.*Pass a map-style dataset"):
        clantune_scale.attach(model, _adam(model), config=_line(tmp_path), eval_data=stream, micro_batch_size=8)
    clan = attach(tmp_path, model, _adam(model))
    with pytest.raises(ConfigError, match="training_data is a .* without __len__ or __getitem__"):
        clan.loader(stream)
    clan.detach()


def _line(directory: Any) -> dict[str, Any]:
    return {"members": "line", "population_size": 4, "tracking": {"directory": str(directory), "mlflow": False}}


class Rotary(nn.Module):
    """Keeps a cache as long as the longest sample that it has seen."""

    def __init__(self, is_persistent: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("cache", torch.ones(4), persistent=is_persistent)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if inputs.shape[1] > len(self.cache):
            self.cache = torch.ones(inputs.shape[1])
        return (self.weight * self.cache[: inputs.shape[1]] * inputs - 1).square().mean()


def _with_caches(rank: int, directory: str) -> list[Any]:
    """Samples of other lengths on each member, and clones between them."""
    block = {
        "population_size": 2,
        "round_length": 2,
        "strategy": "pbt",
        "genes": ["lr"],
        "fitness": {"num_samples": 8},
        "tracking": {"directory": directory, "mlflow": False},
        "checkpoint": {"every_rounds": None},
    }
    clantune_scale.join(block)
    dist.init_process_group("gloo")
    found: list[Any] = []
    samples = list(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))
    for is_persistent in (False, True):
        model = DistributedDataParallel(Rotary(is_persistent), broadcast_buffers=False)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        clan = clantune_scale.attach(model, optimizer, config=block, eval_data=samples, micro_batch_size=4)
        try:
            for step in clan.steps([torch.ones(4, 6 + 2 * rank)], until=4):
                for batch in step:
                    model(batch).backward()
                optimizer.step()
                optimizer.zero_grad()
            found.append(len(model.module.cache))
        except ClanError as error:
            found.append(str(error))
        clan.detach()
    return found


def test_a_cache_may_grow_on_each_member_and_a_buffer_that_is_state_is_named(tmp_path):
    for rank, (length, said) in enumerate(run_ranks(2, in_member_worlds, _with_caches, str(tmp_path))):
        assert length == 6 + 2 * rank
        assert "fixed.cache" in said and "register it with persistent=False" in said


def _resized(rank: int, directory: str) -> dict[str, Any]:
    config = clan_config(directory, ds_config(1, accumulation=1), strategy="control")
    del config["gradient_accumulation_steps"]
    engine, loader = start(config | {"train_batch_size": 2 * MICRO})
    train_engine(engine, loader, 2)
    seen = []
    engine.set_train_batch_size(4 * MICRO)
    take_step = engine._take_model_step
    engine._take_model_step = lambda *a, **k: seen.append(engine.gradient_accumulation_steps()) or take_step(*a, **k)
    losses = train_engine(engine, loader, 12)
    found: dict[str, Any] = {"seen": seen, "micro-batches": len(losses)}
    for name, call in {
        "odd": lambda: engine.set_train_batch_size(3 * MICRO),
        "micro": lambda: engine.set_train_micro_batch_size(2),
    }.items():
        with pytest.raises(ConfigError) as raised:
            call()
        found[name] = str(raised.value)
    return found


def test_a_batch_size_that_the_script_changes_is_followed_in_all_later_phases(tmp_path):
    for found in run_ranks(2, in_member_worlds, _resized, str(tmp_path)):
        assert found["seen"] == [2] * 10 and found["micro-batches"] == 20
        assert "2 members of 1 data-parallel ranks with micro-batches of 4 take multiples of 8" in found["odd"]
        assert "Call engine.set_train_batch_size()" in found["micro"]


def _loaded(rank: int, directory: str) -> dict[str, Any]:
    """A DeepSpeed checkpoint, saved by one clan's engine, and loaded right after another one was made."""
    saved, loader = start(clan_config(f"{directory}/a", ds_config(1)))
    train_engine(saved, loader, 7)
    saved.clan.detach()
    if rank == 0:
        saved.save_checkpoint(f"{directory}/checkpoint", tag="t")
    engine, loader = start(clan_config(f"{directory}/b", ds_config(1), checkpoint={"every_rounds": None}))
    clan = engine.clan
    clan.world.replica_group.gather_json(None)
    engine.load_checkpoint(f"{directory}/checkpoint", tag="t")
    loaded = clan.backend.masters()[0].clone()
    found = {
        "steps": (engine.global_steps, clan.num_steps, clan.phases.position.step),
        "average": torch.equal(clan.measurement.ema.tensors[0], loaded),
        "snapshot": torch.equal(dict(clan.progress.rollback_snapshot.tensors)["master.0"], loaded),
        "measured": clan.fitness.mean.tolist() == clan.measurement.fitness(averaged=False).mean.tolist(),
    }
    train_engine(engine, loader, 13)
    found["after"] = (engine.global_steps, clan.phases.position.step)
    found["rounds"] = [(record.start_step, record.end_step) for record in clan.progress.lineage]
    with pytest.raises(ClanError, match="a checkpoint was loaded at step 7 of a clan that has trained"):
        engine.load_checkpoint(f"{directory}/checkpoint", tag="t")
    return found


def test_an_engines_checkpoint_that_is_loaded_first_is_what_the_clan_begins_with(tmp_path):
    for found in run_ranks(2, in_member_worlds, _loaded, str(tmp_path)):
        assert found == {
            "steps": (7, 7, 7),
            "average": True,
            "snapshot": True,
            "measured": True,
            "after": (13, 13),
            "rounds": [(7, 12)],
        }
