"""DeepSpeed scripts as they are, their clans on the line."""

from __future__ import annotations

import pytest
import torch

import clantune_scale
from clantune_scale.errors import ConfigError
from tests.backends.small_runs import MICRO, Net, ds_config, flat_weights, in_member_worlds, plain_engine
from tests.ranks import run_ranks
from tests.small_clans import clan_config, datasets, start, train

#: Two rounds, then a trial of 20 steps.
SEARCH = {
    "members": "line",
    "population_size": 4,
    "total_steps": 100,
    "strategy": {"name": "clan", "options": {"trial_cost": 0.6, "trial_at": 0.1}},
}
NUM_STEPS = 33


def _result(engine, loader):
    clan = engine.clan
    lineage = [(record.losses, record.genomes) for record in clan.progress.lineage]
    counts = (engine.global_steps, engine.global_samples, loader.batch_sampler.position.step)
    return flat_weights(engine), lineage, counts


def _unmodified(rank, config):
    torch.distributed.init_process_group("gloo")
    engine, loader = start(config)
    train(engine, loader, NUM_STEPS)
    return _result(engine, loader)


def _by_steps(rank, config):
    """The engine exists before anything of the clan does."""
    torch.distributed.init_process_group("gloo")
    engine = plain_engine({key: value for key, value in config.items() if key != "clantune"})
    train_set, valid = datasets()
    clan = clantune_scale.attach(engine, config=config, eval_data=valid, num_samples=len(train_set))
    assert clan is engine.clan
    loader = clan.loader(train_set)
    for step in clan.steps(loader, until=NUM_STEPS):
        for batch in step:
            engine.backward(engine(*batch))
            engine.step()
    return _result(engine, loader)


def test_an_unmodified_loop_is_tuned_with_its_trial(tmp_path):
    def block(name):
        return clan_config(tmp_path / name, ds_config(1, accumulation=2, clip=0.5), **SEARCH)

    loops = run_ranks(2, in_member_worlds, _unmodified, block("loop"))
    steps = run_ranks(2, in_member_worlds, _by_steps, block("steps"))
    for (weights, lineage, counts), (expected, theirs, _) in zip(loops, steps, strict=True):
        assert torch.equal(weights, expected)
        assert lineage == theirs and len({loss for losses, _ in lineage for loss in losses}) > 8
        # Steps, samples and batches are those of a run without a clan.
        assert counts == (NUM_STEPS, NUM_STEPS * 2 * 2 * MICRO, NUM_STEPS)


class Logits(Net):
    """Its loss is made outside of it."""

    def forward(self, inputs, targets=None):
        loss = super().forward(inputs, torch.zeros(len(inputs), 8) if targets is None else targets)
        return loss if targets is not None else (loss.unsqueeze(0).repeat(2),)


def _with_a_loss_of_its_own(rank, config):
    train_set, valid = datasets()
    model = Logits()
    engine, _, loader, _ = clantune_scale.initialize(
        model=model, model_parameters=model.parameters(), config=config, training_data=train_set, eval_data=valid
    )
    for inputs, _ in loader:
        engine.backward(engine(inputs)[0].sum())
        engine.step()


def test_a_loop_that_makes_its_own_loss_is_told_at_its_first_step(tmp_path):
    config = clan_config(tmp_path, ds_config(0), **SEARCH)
    with pytest.raises(Exception, match=r"clan\.steps\(loader\)"):
        run_ranks(1, in_member_worlds, _with_a_loss_of_its_own, config)


def _groups(rank, config):
    torch.distributed.init_process_group("gloo")
    engine = plain_engine({key: value for key, value in config.items() if key != "clantune"})
    try:
        clantune_scale.attach(engine, config=config, eval_data=datasets()[1])
    except ConfigError as error:
        return str(error)
    return "not refused"


def test_an_engine_that_exists_cannot_be_divided_into_groups(tmp_path):
    (said,) = run_ranks(1, in_member_worlds, _groups, clan_config(tmp_path, ds_config(0)))
    assert 'Set "members" to "line"' in said and "clantune_scale.initialize()" in said
