"""Whole clans on DeepSpeed: against flat data parallelism, the reference twin, and themselves."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode

from clantune_scale.tracking import read_events
from tests.backends.small_runs import ds_config, flat_weights, in_member_worlds
from tests.ranks import RankError, run_ranks
from tests.small_clans import clan_config, flat_run, start, train

# Two summation orders in float32; AdamW's division by small second moments turns 1e-8 into up to 1e-6 in 12 steps.
FP32 = 2e-6


def _clan_run(rank, config, num_steps, options=None):
    engine, loader = start(config, **(options or {}))
    losses = train(engine, loader, num_steps)
    clan = engine.clan
    history = [(r.genomes, r.losses, r.donors, r.restored) for r in clan.progress.lineage]
    return flat_weights(engine), losses, history, clan.population, str(clan.recorder.run_dir)


def _flat(rank, config, num_steps):
    return flat_run(config, num_steps)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_clan_of_equal_genomes_equals_flat_data_parallelism(stage, tmp_path):
    config = ds_config(stage, accumulation=2, clip=0.5)
    flat = run_ranks(4, in_member_worlds, _flat, config, 12)
    block = clan_config(tmp_path, config, strategy="control", total_steps=12)
    clan = run_ranks(4, in_member_worlds, _clan_run, block, 12)
    for (expected, flat_losses), (weights, losses, *_) in zip(flat, clan, strict=True):
        assert (weights - expected).abs().max() < FP32
        assert losses == pytest.approx(flat_losses, abs=1e-5)


def _cooperate_with_own_rates(rank, config):
    engine, loader = start(config)
    clan = engine.clan
    gradients = []
    update = engine.optimizer.step

    def record_then_update(*args, **kwargs):
        gradients.append(torch.cat([p.grad.flatten().clone() for p in engine.module.parameters()]))
        return update(*args, **kwargs)

    own = []
    engine.optimizer.step = record_then_update
    backward = engine.allreduce_gradients

    def record_own(*args, **kwargs):
        own.append(torch.cat([p.grad.flatten().clone() for p in engine.module.parameters()]))
        return backward(*args, **kwargs)

    engine.allreduce_gradients = record_own
    train(engine, loader, 4)
    return gradients, own, flat_weights(engine), clan.genome.values["lr"], clan.learning_rate(3)


def test_members_apply_the_same_mean_gradient_each_at_its_own_rate(tmp_path):
    block = clan_config(tmp_path, ds_config(0), genes={"lr": {"step_size": 0.5}}, population_size=4)
    results = run_ranks(4, in_member_worlds, _cooperate_with_own_rates, block)
    mean = torch.stack([own[0] for _, own, *_ in results]).mean(0)
    for gradients, own, _, gene, rate in results:
        assert torch.equal(gradients[0], results[0][0][0])
        # The bucket's own sum and stack().mean() add four float32 numbers in different orders.
        assert (gradients[0] - mean).abs().max() < 1e-7
        assert not torch.allclose(own[0], mean, atol=1e-3)
        assert rate == pytest.approx(1e-2 * gene)
    weights = [flat for _, _, flat, *_ in results]
    assert len({gene for *_, gene, _ in results}) == 4
    assert all((weights[0] - other).abs().max() > 1e-3 for other in weights[1:])


def test_the_same_seed_makes_the_same_run(tmp_path):
    def block(name, seed):
        return clan_config(
            tmp_path / name,
            ds_config(1, clip=1.0),
            strategy="classic",
            genes=["lr", "weight_decay", "beta1"],
            seed=seed,
        )

    first = run_ranks(2, in_member_worlds, _clan_run, block("a", 3), 17)
    second = run_ranks(2, in_member_worlds, _clan_run, block("b", 3), 17)
    other = run_ranks(2, in_member_worlds, _clan_run, block("c", 4), 17)
    for (weights, *rest, _), (same_weights, *same_rest, _) in zip(first, second, strict=True):
        assert torch.equal(weights, same_weights)
        assert rest == same_rest
    assert first[0][2] == first[1][2]
    assert other[0][2] != first[0][2]


def _count_collectives(rank, config, num_steps):
    engine, loader = start(config)
    batches = [next(iter(loader)) for _ in range(num_steps)]
    counts = []
    for inputs in batches:
        with CommDebugMode() as mode:
            loss = engine(*inputs)
            engine.backward(loss)
            engine.step()
        counts.append({str(name): count for name, count in mode.get_comm_counts().items()})
    return counts


def _count_flat_collectives(rank, config, num_steps):
    from tests.backends.small_runs import batch, plain_engine

    engine = plain_engine(config)
    counts = []
    for step in range(num_steps):
        with CommDebugMode() as mode:
            loss = engine(*batch(step, 0, rank))
            engine.backward(loss)
            engine.step()
        counts.append({str(name): count for name, count in mode.get_comm_counts().items()})
    return counts


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_cooperative_step_posts_the_collectives_of_plain_data_parallelism(stage, tmp_path):
    """And one more, of a number per member, for the finite vote."""
    config = ds_config(stage, clip=0.5)
    flat = run_ranks(2, in_member_worlds, _count_flat_collectives, config, 3)
    clan = run_ranks(4, in_member_worlds, _count_collectives, clan_config(tmp_path, config), 3)
    # The first step may set things up; the last two are inside one round.
    assert clan[0][1:] == [step | {"c10d.allreduce_": step.get("c10d.allreduce_", 0) + 1} for step in flat[0][1:]]
    assert sum(flat[0][2].values()) > 0


def test_without_the_finite_vote_the_collectives_are_those_of_plain_data_parallelism(tmp_path):
    config = ds_config(1, clip=0.5)
    flat = run_ranks(2, in_member_worlds, _count_flat_collectives, config, 3)
    block = clan_config(tmp_path, config, faults={"nonfinite_mask": False})
    assert run_ranks(4, in_member_worlds, _count_collectives, block, 3)[0][1:] == flat[0][1:]


def test_zero_3_adds_one_collective_for_each_bucket_of_shards(tmp_path):
    config = ds_config(3, clip=0.5)
    # ZeRO 3 traces its first two steps; an evaluation before them leaves no trace, or there would be more gathers.
    flat = run_ranks(2, in_member_worlds, _count_flat_collectives, config, 4)[0][-1]
    clan = run_ranks(4, in_member_worlds, _count_collectives, clan_config(tmp_path, config), 4)[0][-1]
    scatters = flat["c10d._reduce_scatter_base_"]
    assert clan == flat | {"c10d.allreduce_": flat["c10d.allreduce_"] + scatters + 1}
    assert scatters == 1


def test_optimizer_genes_and_rounds_leave_their_trace(tmp_path):
    block = clan_config(tmp_path, ds_config(1), genes=["lr", "beta1"], total_steps=40)
    results = run_ranks(2, in_member_worlds, _finish, block, 40)
    events = read_events(results[0][0].run_dir / "events.jsonl")
    kinds = [event["kind"] for event in events]
    assert kinds[0] == "run_start" and kinds[-1] == "run_end"
    rounds = [event for event in events if event["kind"] == "round_end"]
    assert [event["step"] for event in rounds] == sorted({event["step"] for event in rounds})
    assert rounds[-1]["step"] == 40
    assert all(len(event["members"]) == 2 for event in rounds)
    assert events[-1]["status"] == "FINISHED"
    summary, test_losses, saved = results[0]
    assert saved is not None and test_losses[0] == pytest.approx(summary.champion_loss, rel=1e-5)
    assert rounds[-1]["members"][0]["loss"] < 0.6 * events[0]["initial_loss"]
    for name in ("champion", "schedule", "genes"):
        assert summary.run_dir.joinpath(summary.artifacts[name]).stat().st_size > 100


def _finish(rank, config, num_steps):
    from safetensors.torch import load_file

    engine, loader = start(config)
    train(engine, loader, num_steps)
    summary = engine.clan.finish()
    assert engine.clan.finish() is summary
    from tests.small_clans import datasets

    losses = engine.clan.evaluate(datasets()[1])
    saved = load_file(summary.artifacts["champion"])
    weights = {name: parameter.detach() for name, parameter in engine.module.named_parameters()}
    assert saved.keys() == weights.keys()
    if engine.clan.member == summary.champion:
        assert all(torch.equal(saved[name], weights[name]) for name in saved)
    assert "step" not in vars(engine)
    return summary, losses, list(saved)


def _with_a_bad_batch(rank, config, num_steps, bad_step):
    """Member 1 reads one batch that is not finite while the clan cooperates."""
    engine, loader = start(config)
    losses = []
    for step, (inputs, targets) in zip(range(num_steps), loader, strict=False):
        is_bad = engine.clan.member == 1 and step == bad_step
        loss = engine(torch.full_like(inputs, float("nan")) if is_bad else inputs, targets)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    events = engine.clan.recorder.run_dir / "events.jsonl"
    return flat_weights(engine), losses, events


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_member_with_a_bad_batch_is_left_out_of_one_mean_and_takes_a_strike(stage, tmp_path):
    block = clan_config(tmp_path, ds_config(stage, clip=0.5), strategy="control", population_size=2)
    results = run_ranks(4, in_member_worlds, _with_a_bad_batch, block, 5, 2)
    for weights, losses, _ in results:
        assert weights.isfinite().all()
        assert torch.equal(weights, results[0][0])
        assert sum(loss != loss for loss in losses) <= 1
    rounds = [event for event in read_events(results[0][2]) if event["kind"] == "round_end"]
    assert [member["strikes"] for member in rounds[0]["members"]] == [0, 2]


def test_without_the_vote_a_bad_batch_reaches_everyone(tmp_path):
    block = clan_config(tmp_path, ds_config(0), strategy="classic", faults={"nonfinite_mask": False})
    with pytest.raises(RankError, match="none of the 2 members has a finite validation loss"):
        run_ranks(2, in_member_worlds, _with_a_bad_batch, block, 5, 2)


def _build_only(rank, config):
    """What the constructor of a clan did to ranks and engine."""
    import clantune_scale
    from clantune_scale.backends.deepspeed import attach
    from clantune_scale.runtime.clan import Clan
    from tests.small_clans import Net, datasets

    seen = {}

    class Watched(Clan):
        def __init__(self, **parts):
            backend = parts["backend"]
            names, num_hooks = list(vars(backend.engine)), len(backend.module._forward_pre_hooks)
            groups = [dict(group) for group in backend.param_groups()]
            with CommDebugMode() as mode:
                super().__init__(**parts)
            seen["collectives"] = mode.get_total_counts()
            num_now = len(backend.module._forward_pre_hooks)
            seen["hooked"] = list(vars(backend.engine)) != names or num_now != num_hooks
            pairs = zip(backend.param_groups(), groups, strict=True)
            seen["changed"] = [key for now, before in pairs for key in now if now[key] is not before.get(key)]
            seen["groups"] = list(self.groups._groups)

        def start(self):
            """Nothing: what is looked at is the constructor."""

    attach.Clan = Watched
    model = Net()
    clantune_scale.initialize(model=model, config=config, model_parameters=model.parameters(), eval_data=datasets()[1])
    return seen


def test_construction_has_no_effect_on_ranks_disk_or_engine(tmp_path):
    runs = tmp_path / "runs"
    config = clan_config(tmp_path)
    config["clantune"]["tracking"]["directory"] = str(runs)
    for seen in run_ranks(2, in_member_worlds, _build_only, config):
        assert seen == {"collectives": 0, "hooked": False, "changed": [], "groups": []}
    assert not runs.exists()
