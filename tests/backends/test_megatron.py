"""One Megatron-core member: its loss, its whole weights, what it refuses, what a skipped step is, its schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from clantune_scale.errors import ClanError, ConfigError
from tests.backends.families import Setup
from tests.backends.families import megatron as family
from tests.backends.megatron_models import build, initialize, scheduler_of
from tests.backends.plain_gpt import CONTEXT, PlainGPT, token_datasets
from tests.ranks import run_ranks


def _backend(model: Any, optimizer: Any, scheduler: Any = None, **options: Any) -> Any:
    from clantune_scale.backends.megatron import MegatronBackend

    options = {"forward_step": family.forward_step, "seq_length": CONTEXT, "micro_batch_size": 4} | options
    return MegatronBackend(model, optimizer, scheduler, **options)


def _windows(start: int, count: int) -> torch.Tensor:
    return token_datasets()[0].tensors[0][start : start + count]


def _step(model: Any, optimizer: Any, batches: list[torch.Tensor]) -> Any:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    model.zero_grad_buffer()
    optimizer.zero_grad()
    get_forward_backward_func()(
        forward_step_func=family.forward_step,
        data_iterator=iter([[batch] for batch in batches]),
        model=[model],
        num_microbatches=len(batches),
        seq_length=CONTEXT,
        micro_batch_size=len(batches[0]),
        forward_only=False,
    )
    return optimizer.step()


def _whole(setup: Setup) -> dict[str, Any]:
    """A member of two stages and two tensor shards: what its ranks say of it."""
    from tests import megatron_shim

    megatron_shim.install()
    initialize(setup)
    model, optimizer = build(setup)
    backend = _backend(model, optimizer, accumulation=2)
    weights = backend.full_weights()
    batches, losses = [], []
    backend.watch(lambda args, kwargs: batches.append(args[0]), losses.append)
    model.module.decoder.eval()
    modes = [part.training for part in model.modules()]
    with backend.evaluating():
        found = [backend.batch_loss([_windows(0, 6)], None)]
        evaluate = lambda engine, batch: 2.0 if backend.pp_rank == backend.pp_size - 1 else None  # noqa: E731
        found.append(backend.batch_loss([_windows(0, 6)], evaluate))
    restored = modes == [part.training for part in model.modules()]
    model.train()
    _step(model, optimizer, [_windows(10, 4), _windows(20, 4)])
    dist.barrier()
    return {
        "weights": weights, "losses": [loss.item() for loss in found], "restored": restored,
        "trained": [loss.item() for loss in losses], "batches": len(batches), "pp_rank": backend.pp_rank,
    }  # fmt: skip


def test_stages_and_shards_are_one_model():
    """The champion's weights are the whole model's, and every rank knows the losses of its pipeline."""
    for is_tied in (False, True):
        seen = run_ranks(4, _whole, Setup(members=1, pp=2, tp=2, is_tied=is_tied), preload=family.PRELOAD)
        twin = PlainGPT(is_tied=is_tied)
        told = [rank["weights"] for rank in seen if rank["weights"] is not None]
        assert len(told) == 2 and not told[0].keys() & told[1].keys()
        joined = told[0] | told[1]
        expected = dict(twin.named_parameters())
        assert joined.keys() == expected.keys()
        assert all(torch.equal(joined[name], expected[name]) for name in expected)
        with torch.no_grad():
            evaluated = twin(_windows(0, 6)).item()
            trained = (twin(_windows(10, 4)) + twin(_windows(20, 4))).item() / 2
        for rank in seen:
            assert rank["losses"] == pytest.approx([evaluated, 2.0], rel=1e-5) and rank["restored"]
            assert rank["trained"] == pytest.approx([trained], rel=1e-5)
            # The evaluation's batches are not shown, and later stages' inputs say nothing of the data.
            assert rank["batches"] == (2 if rank["pp_rank"] == 0 else 0)


def _refused() -> list[str]:
    """What a member of one rank refuses, by changing one setting at a time."""
    from megatron.core import num_microbatches_calculator as calculator

    from tests import megatron_shim

    megatron_shim.install()
    initialize(Setup())
    model, optimizer = build(Setup())
    said = []

    def tell(make: Any) -> None:
        try:
            make()
            said.append("accepted")
        except ConfigError as error:
            said.append(str(error))

    tell(lambda: _backend([model], optimizer))
    tell(lambda: _backend([model, model], optimizer))
    tell(lambda: _backend(model.module, optimizer))
    for owner, name, value in (
        (model.config, "context_parallel_size", 2),
        (model.config, "expert_model_parallel_size", 2),
        (model.ddp_config, "num_distributed_optimizer_instances", 2),
        (model.config, "finalize_model_grads_func", None),
        (optimizer.config, "optimizer_cpu_offload", True),
        (optimizer, "chained_optimizers", [model]),
    ):
        before = getattr(owner, name)
        setattr(owner, name, value)
        tell(lambda: _backend(model, optimizer))
        setattr(owner, name, before)
    calculator.init_num_microbatches_calculator(0, [4, 4, 40], 8, 4, 1)
    tell(lambda: _backend(model, optimizer))
    calculator.destroy_num_microbatches_calculator()
    return said


def test_settings_that_a_clan_cannot_run_under_are_refused():
    accepted, *said = run_ranks(1, _refused, preload=family.PRELOAD)[0]
    assert accepted == "accepted"
    expected = [
        "2 model chunks", "the model is a GPTModel", "context_parallel_size is 2", "expert_model_parallel_size is 2",
        "num_distributed_optimizer_instances is 2", "finalize_model_grads_func is None", "optimizer_cpu_offload is on",
        "the optimizer is a DistributedDataParallel", "the batch size ramps up",
    ]  # fmt: skip
    assert len(said) == len(expected)
    for text, part in zip(said, expected, strict=True):
        assert part in text and text.count(". ") >= 1, text


def _scheduled() -> dict[str, Any]:
    """A member with Megatron's schedule and its calculator, driven by hand."""
    from megatron.core import num_microbatches_calculator as calculator

    from clantune_scale.config.schema import GeneConfig
    from clantune_scale.runtime.attach import optimizer_facts
    from clantune_scale.runtime.genome_application import Expression, bind_genes
    from tests import megatron_shim

    megatron_shim.install()
    setup = Setup(options={"scheduled": True, "dropout": 0.1})
    initialize(setup)
    model, optimizer = build(setup)
    scheduler = scheduler_of(setup, optimizer)
    calculator.init_num_microbatches_calculator(0, None, 8, 4, 1)
    backend = _backend(model, optimizer, scheduler, accumulation=2)
    configs = {
        "lr": GeneConfig(),
        "weight_decay": GeneConfig(mode="absolute", initial=0.01, bounds=(1e-4, 1.0)),
        "clip": GeneConfig(initial=1.0),
        "accumulation": GeneConfig(),
        "dropout": GeneConfig(),
    }
    expression = Expression(bind_genes(configs, backend, {}), backend, {})
    expression.express({"lr": 2.0, "weight_decay": 0.5, "clip": 0.25, "accumulation": 3, "dropout": 0.3})
    steps, inside = [], []
    backend.around_update(expression.during_update)
    backend.after_step(lambda: steps.append(backend.num_steps))
    inner = optimizer.chained_optimizers[0].optimizer
    inner.register_step_pre_hook(
        lambda *_: inside.extend((group["lr"], group["weight_decay"]) for group in inner.param_groups)
    )
    found: dict[str, Any] = {"rates": [], "optimizer": optimizer_facts(backend)}
    for number in range(3):
        found["rates"].append(optimizer.param_groups[0]["lr"])
        _step(model, optimizer, [_windows(4 * number, 4)])
        assert len(steps) == number, "the step ends with the schedule"
        scheduler.step(increment=1)
    found |= {
        "inside": inside, "steps": steps, "clip": backend.clip, "micro_batches": calculator.get_num_microbatches(),
        "shares": [group["wd_mult"] for group in optimizer.param_groups],
        "dropouts": [layer.hidden_dropout for layer in model.module.decoder.layers],
        "attention": model.module.decoder.layers[0].self_attention.core_attention.attention_dropout.p,
        "weight_decays": [group["weight_decay"] for group in optimizer.param_groups],
    }  # fmt: skip
    _step(model, optimizer, [_windows(0, 4)])
    try:
        _step(model, optimizer, [_windows(0, 4)])
    except ClanError as error:
        found["forgotten"] = str(error)
    found["schedule"] = _loaded_again(backend, optimizer, scheduler)
    backend.detach()
    expression.restore()
    found["restored"] = (
        [layer.hidden_dropout for layer in model.module.decoder.layers], backend.clip, backend.accumulation,
    )  # fmt: skip
    return found


def _loaded_again(backend: Any, optimizer: Any, scheduler: Any) -> tuple[int, bool]:
    """The schedule's step after its state was loaded, and whether the optimizer has the rate of that step."""
    state = backend.state()
    saved = state.scalars["schedule"]
    scheduler.num_steps = 20
    state.load_scalars({"optimizer": state.scalars["optimizer"], "schedule": saved})
    return scheduler.num_steps, optimizer.param_groups[0]["lr"] == scheduler.get_lr({})


def test_genes_go_after_the_schedule_and_keep_each_groups_share():
    found = run_ranks(1, _scheduled, preload=family.PRELOAD)[0]
    # Warm-up from 0 over two steps to 0.01.
    assert found["rates"] == pytest.approx([0.0, 0.005, 0.01])
    first = [lr for lr, _ in found["inside"][:: len(found["shares"])]]
    assert first[:3] == pytest.approx([2 * rate for rate in found["rates"]])
    decays = [decay for _, decay in found["inside"][: len(found["shares"])]]
    assert decays == pytest.approx([0.5 * share for share in found["shares"]]) and 0.0 in found["shares"]
    assert found["weight_decays"] == pytest.approx([0.01 * share for share in found["shares"]])
    assert found["optimizer"][0] == "adamw" and max(found["optimizer"][1]) == pytest.approx(0.01)
    assert found["steps"] == [1, 2, 3] and found["clip"] == 0.25 and found["micro_batches"] == 3
    assert found["dropouts"] == [0.3, 0.3] and found["attention"] == 0.3
    assert "scheduler's step() was not called after optimizer step 4" in found["forgotten"]
    assert found["schedule"] == (3, True)
    assert found["restored"] == ([0.1, 0.1], 0.0, 2)


def _skipped() -> dict[str, Any]:
    """fp16 with a scale under which gradients overflow at first."""
    from tests import megatron_shim

    megatron_shim.install()
    setup = Setup(dtype="fp16", optimizer="sgd", options={"loss_scale": 2.0**24, "scheduled": True})
    initialize(setup)
    model, optimizer = build(setup)
    scheduler = scheduler_of(setup, optimizer)
    backend = _backend(model, optimizer, scheduler)
    scales, updates = [], []
    backend.after_step(lambda: scales.append(backend.loss_scale()["cur_scale"]))
    for number in range(16):
        is_updated, *_ = _step(model, optimizer, [_windows(4 * number, 4)])
        updates.append(is_updated)
        if is_updated:
            scheduler.step(increment=1)
    backend.set_loss_scale({"cur_scale": 64.0, "growth_tracker": 3, "hysteresis_tracker": 1})
    return {
        "updates": updates, "scales": scales, "steps": backend.num_steps, "scheduled": scheduler.num_steps,
        "set": backend.loss_scale(),
    }  # fmt: skip


def test_a_step_that_is_skipped_counts_as_a_step():
    found = run_ranks(1, _skipped, preload=family.PRELOAD)[0]
    skipped = found["updates"].count(False)
    assert not found["updates"][0] and found["updates"][-1] and 0 < skipped < 16
    assert found["steps"] == 16 == len(found["scales"])
    assert found["scheduled"] == 16 - skipped
    assert found["scales"][-1] == 2.0 ** (24 - skipped)
    assert found["set"] == {"cur_scale": 64.0, "growth_tracker": 3.0, "hysteresis_tracker": 1.0}


def _gated(tp: int) -> torch.Tensor:
    """A gated MLP's first layer, each tensor rank's part of it numbered by the row of the whole one."""
    from clantune_scale.backends.megatron import weights
    from tests import megatron_shim

    megatron_shim.install()
    setup = Setup(tp=tp, options={"gated": True})
    initialize(setup)
    model, _ = build(setup)
    layer = model.module.decoder.layers[0].mlp.linear_fc1.weight
    rows, rank = layer.shape[0] // 2, dist.get_rank()
    gate = torch.arange(rows) + rank * rows
    with torch.no_grad():
        layer.copy_(torch.cat([gate, gate + tp * rows])[:, None].expand_as(layer))
    whole = weights.joined(model.module, model.tp_group, is_gated=True)
    dist.barrier()
    return whole["decoder.layers.0.mlp.linear_fc1.weight"][:, 0]


@pytest.mark.slow
def test_the_halves_of_a_gated_layer_are_joined_one_by_one():
    for replica_group in run_ranks(2, _gated, 2, preload=family.PRELOAD):
        assert torch.equal(replica_group, torch.arange(len(replica_group), dtype=replica_group.dtype))


# Megatron-core warns of what is not installed beside it.
@pytest.mark.filterwarnings("ignore")
def test_an_optimizer_that_contradicts_the_configs_threshold_is_refused_with_both():
    from clantune_scale.backends.megatron.attach import _require_same_clipping

    said = r"the config says gradient_clipping: 1, and the optimizer has clip_grad=0.5. Build the optimizer with Optim"
    with pytest.raises(ConfigError, match=said):
        _require_same_clipping({"gradient_clipping": 1.0}, 0.5)
    _require_same_clipping({"gradient_clipping": 0.5}, 0.5)
    _require_same_clipping({}, 0.5)
