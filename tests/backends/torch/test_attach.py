"""``clantune_scale.attach``: loops of a user's own, genes between steps, and what is refused."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import clantune_scale
from clantune_scale.backends.torch.engine import LoopBackend
from clantune_scale.errors import ClanError, ConfigError, TopologyError
from clantune_scale.tracking import read_events
from tests.backends.small_runs import MICRO, Net, in_member_worlds
from tests.ranks import run_ranks
from tests.small_clans import datasets

RATE, DECAY = 1e-2, 0.9


def _block(directory: str, **changes: Any) -> dict:
    return {
        "population_size": 2,
        "round_length": 4,
        "fitness": {"num_samples": 16, "batch_size": 8},
        "tracking": {"directory": directory, "mlflow": False, "print_every_steps": 1000},
    } | changes


def _attach(model: torch.nn.Module, optimizer: Any, block: Any, scheduler: Any = None, **options: Any) -> Any:
    options = {"eval_data": datasets()[1], "micro_batch_size": MICRO, **options}
    return clantune_scale.attach(model, optimizer, scheduler, config=block, **options)


def _said(call: Any) -> str:
    try:
        call()
    except ClanError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _refusals(rank: int, directory: str) -> dict[str, str]:
    block = _block(directory, population_size=1)
    clantune_scale.join(block)
    dist.init_process_group("gloo")

    def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    def sharded(part: str | None = None, **options: Any) -> torch.nn.Module:
        model = Net()
        fully_shard(model if part is None else getattr(model, part), **options)
        return model

    plain, whole = Net(), sharded()
    stale = sgd(plain)
    fully_shard(plain)
    hooked = DistributedDataParallel(Net())
    hooked.register_comm_hook(None, allreduce_hook)
    hybrid = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    alone = dist.new_group([rank], use_local_synchronization=True)
    closing, deep = DistributedDataParallel(Net()), DistributedDataParallel(Net())
    models = {
        "plain": (Net(), None),
        "stale": (plain, stale),
        "half": (fully_shard(Net().to(torch.bfloat16)), None),
        "hybrid": (sharded(mesh=hybrid), None),
        "part": (sharded("second"), None),
        "hook": (hooked, None),
        "alone": (DistributedDataParallel(Net(), process_group=alone), None),
        "no optimizer": (whole, whole.parameters()),
    }
    said = {name: _said(lambda m=m, o=o: _attach(m, o or sgd(m), block)) for name, (m, o) in models.items()}
    said["nothing to evaluate"] = _said(lambda: _attach(whole, sgd(whole), block, eval_data=None))
    said["disabled"] = _said(lambda: _attach(whole, sgd(whole), block | {"enabled": False}))
    written = {"gradient_accumulation_steps": 2, "clantune": block}
    said["contradiction"] = _said(lambda: _attach(whole, sgd(whole), written, accumulation=4))
    said["no size"] = _said(lambda: _attach(whole, sgd(whole), block, micro_batch_size=None))
    said["no block"] = _said(lambda: _attach(whole, sgd(whole), {"train_batch_size": 4}))
    optimizer = sgd(closing)
    # The batch is the clan's: one member of two ranks takes two micro-batches a step.
    written = {"train_batch_size": 4 * MICRO, "train_micro_batch_size_per_gpu": MICRO, "gradient_clipping": 0.5}
    clan = _attach(closing, optimizer, written | {"clantune": block}, micro_batch_size=None)
    said["read"] = f"{clan.backend.micro_batch_size}, {clan.backend.accumulation}, {clan.backend.clip}"
    clan.detach()
    optimizer = sgd(deep)
    clan = _attach(deep, optimizer, block)
    optimizer.state[next(deep.parameters())]["factors"] = [torch.zeros(2)]
    said["deep"] = _said(clan.state)
    return said


def test_what_a_clan_cannot_run_under_is_refused(tmp_path):
    expected = {
        "plain": "ConfigError: the model is a plain Net, whose gradients nothing averages. Apply fully_shard()",
        "stale": "ConfigError: the optimizer updates 6 tensors that are not parameters of the model",
        "half": "ConfigError: first.weight is kept in torch.bfloat16",
        "hybrid": "ConfigError: the model is sharded over a mesh of two dimensions (hybrid sharding)",
        "part": "ConfigError: first.weight trains, and fully_shard() was not applied to its module",
        "hook": "ConfigError: DDP has a communication hook already (allreduce_hook)",
        "alone": "of a member that has 2. Leave process_group out",
        "no optimizer": "ConfigError: the optimizer is a generator, and the clan cannot find its state",
        "nothing to evaluate": "ConfigError: a clan compares its members on common examples and there are none",
        "disabled": 'ConfigError: "clantune" says "enabled": false',
        "contradiction": "was given accumulation=4, and the config says gradient_accumulation_steps: 2. Leave one",
        "no size": "attach() got no micro_batch_size, and the config has neither train_micro_batch_size_per_gpu nor",
        "read": f"{MICRO}, 2, 0.5",
        "no block": 'ConfigError: the config has no "clantune" block',
        "deep": "ConfigError: SGD keeps 'factors', a list, for each parameter",
    }
    for said in run_ranks(2, in_member_worlds, _refusals, str(tmp_path)):
        assert said.keys() == expected.keys()
        for name, message in expected.items():
            assert message in said[name], name


def _default_genes(rank: int, directory: str, kind: str, decay: float) -> list[str]:
    block = _block(directory, total_steps=10)
    clantune_scale.join(block)
    dist.init_process_group("gloo")
    model = DistributedDataParallel(Net())
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=RATE, weight_decay=decay)
    clan = _attach(model, optimizer, block, num_samples=1000)
    clan.finish()
    return [gene.name for gene in clan.genes]


@pytest.mark.parametrize(("kind", "decay", "num_genes"), [("AdamW", 0.1, 2), ("AdamW", 0.0, 1), ("SGD", 0.1, 1)])
def test_weight_decay_is_tuned_by_default_only_of_adamw_with_some(kind, decay, num_genes, tmp_path):
    for genes in run_ranks(2, in_member_worlds, _default_genes, str(tmp_path), kind, decay):
        assert genes == ["lr", "weight_decay"][:num_genes]


def _too_late(rank: int, directory: str) -> str:
    dist.init_process_group("gloo")
    try:
        clantune_scale.join(_block(directory, population_size=1))
    except TopologyError as error:
        return str(error)
    return ""


def test_joining_after_the_process_group_is_refused(tmp_path):
    (said,) = run_ranks(1, in_member_worlds, _too_late, str(tmp_path))
    assert "a process group of 1 ranks exists already" in said and "clantune_scale.join() before" in said


def _scheduled(rank: int, directory: str) -> dict[str, Any]:
    """Eight steps of two rounds under a schedule that multiplies, the better member cloned in between."""
    block = _block(directory, strategy="pbt", genes={"lr": {"step_size": 0.5}})
    clantune_scale.join(block)
    dist.init_process_group("gloo")
    model = DistributedDataParallel(Net())
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, DECAY)
    clan = _attach(model, optimizer, block, scheduler)
    seen = []
    for step in clan.steps(clan.loader(datasets()[0]), until=8):
        for batch in step:
            model(*batch).backward()
        optimizer.step()
        seen.append((clan.num_steps, clan.phases.position.step))
        scheduler.step()
        seen.append((clan.num_steps, clan.phases.position.step))
        optimizer.zero_grad()
    rate, epoch = optimizer.param_groups[0]["lr"], scheduler.last_epoch
    optimizer.step()
    forgotten = [_said(lambda: model(*batch)), _said(optimizer.step)]
    nothing = _said(lambda: [None for _ in clan.steps([1, 2])])
    clan.finish()
    optimizer.step()
    events = read_events(clan.recorder.run_dir / "events.jsonl")
    return {
        "seen": seen[:4],
        "rate": rate,
        "epoch": epoch,
        "forgotten": forgotten,
        "nothing": nothing,
        "after": clan.num_steps,
        "genes": [genome.values["lr"] for genome in clan.population.genomes],
        "scheduled": [event["scheduled_rate"] for event in events if event["kind"] == "round_end"],
        "left": [key for key in optimizer.param_groups[0] if "clantune" in key],
    }


def test_a_schedule_is_not_compounded_and_a_step_ends_with_it(tmp_path):
    for found in run_ranks(2, in_member_worlds, _scheduled, str(tmp_path)):
        assert found["seen"] == [(0, 0), (1, 1), (1, 1), (2, 2)]
        assert math.isclose(found["rate"], RATE * DECAY**8, rel_tol=1e-9) and found["epoch"] == 8
        assert set(found["genes"]) != {1.0}
        assert found["scheduled"] == pytest.approx([RATE * DECAY**4, RATE * DECAY**8])
        assert found["left"] == []
        for message in found["forgotten"]:
            assert "scheduler.step() was not called after optimizer step 9" in message
        assert "no optimizer step was taken after 8" in found["nothing"]
        assert found["after"] == 8


def _own_batches(rank: int, directory: str) -> list[tuple[str, int, int, float, float]]:
    """Phase, micro-batches, the gene's, clip in effect, and the norm that gradients were scaled to, by step."""
    genes = {"accumulation": {"bounds": [1, 4], "step_size": 2.0}, "clip": {"step_size": 0.5}}
    block = _block(directory, strategy="classic", duty_cycle=0.5, genes=genes)
    clantune_scale.join(block)
    dist.init_process_group("gloo")
    model = fully_shard(Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    # Two micro-batches a step: the batch is the whole clan's.
    config = {"train_batch_size": 4 * MICRO, "train_micro_batch_size_per_gpu": MICRO, "gradient_clipping": 0.05}
    clan = clantune_scale.attach(model, optimizer, config=config | {"clantune": block}, eval_data=datasets()[1])
    seen = []
    for step in clan.steps(clan.loader(datasets()[0]), until=12):
        phase = clan.phases.position.phase.kind
        wanted = clan.accumulation(phase)[clan.member]
        num_micro = 0
        for batch in step:
            (model(*batch) / len(step)).backward()
            num_micro += 1
        clan.clip_grad_norm_()
        seen.append((phase.value, num_micro, wanted, clan.backend.clip, float(clan.clip_grad_norm_())))
        optimizer.step()
        optimizer.zero_grad()
    return seen


def test_accumulation_and_clip_come_from_the_config_and_follow_their_genes(tmp_path):
    first, second = run_ranks(2, in_member_worlds, _own_batches, str(tmp_path))
    for seen in (first, second):
        for _, num_micro, wanted, clip, norm in seen:
            assert num_micro == wanted
            # The gradients are far longer than the threshold: clipped, they have its length.
            assert norm == pytest.approx(clip, rel=1e-4)
    pairs = list(zip(first, second, strict=True))
    # Accumulation changes the gradient itself: while they cooperate, all members take the clan's number.
    assert all(a[1] == b[1] for a, b in pairs if a[0] == "cooperative")
    assert any(a[1] != b[1] for a, b in pairs if a[0] == "competitive")
    assert all(a[3] != b[3] for a, b in pairs[-4:])


def test_without_a_process_group_nothing_is_parallel():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="there is no process group yet"):
        _attach(model, optimizer, {"population_size": 2})


@pytest.mark.parametrize(
    ("batch", "called"),
    [
        ({"inputs": torch.ones(2), "scale": torch.tensor(3.0)}, {"inputs": 2.0, "scale": 3.0}),
        ([torch.ones(2), torch.tensor(3.0)], {"inputs": 2.0, "scale": 3.0}),
        ((torch.ones(2), torch.tensor(3.0)), {"inputs": 2.0, "scale": 3.0}),
        (torch.ones(2), {"inputs": 2.0, "scale": 1.0}),
    ],
    ids=["mapping", "list", "tuple", "tensor"],
)
def test_a_validation_batch_is_passed_by_keyword_by_position_or_as_it_is(batch, called):
    seen = {}

    def model(inputs: torch.Tensor, scale: torch.Tensor | float = 1.0) -> torch.Tensor:
        seen.update(inputs=float(inputs.sum()), scale=float(scale))
        return inputs.sum() * scale

    parameters = SimpleNamespace(has_half=False)
    backend = SimpleNamespace(engine=model, device=torch.device("cpu"), tp_group=None, _parameters=parameters)
    backend._loss = partial(LoopBackend._loss, backend)
    loss = LoopBackend.batch_loss(backend, batch, None)
    assert seen == called and loss == called["inputs"] * called["scale"]
