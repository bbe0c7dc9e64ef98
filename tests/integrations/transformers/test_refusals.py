"""What cannot be done right in Trainer is refused by name before the first step."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="the extra transformers")

from clantune_scale.errors import CheckpointError, ClanError, ConfigError
from clantune_scale.integrations.transformers import ClanCallback
from tests.integrations.small_lm import Texts
from tests.integrations.transformers.runs import block, trainer_of

# Warnings of the frameworks' own are shown, and do not fail a test.
pytestmark = pytest.mark.filterwarnings("default")


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(Texts(8, seed=0)[index] for index in range(8))


def _refused(tmp_path, error, match, *, config=None, callback=None, **settings):
    callback = callback or ClanCallback(config)
    trainer = trainer_of(tmp_path, callback, max_steps=1, **settings)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    with pytest.raises(error, match=match):
        trainer.train()
    assert all(map(torch.equal, trainer.model.parameters(), before)) and not (tmp_path / "clan_runs").exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"members": "groups"}, '"members" is "groups".*Set "members" to "line"'),
        ({"checkpoint": {"resume": "latest"}}, "resume is 'latest'.*resume_from_checkpoint"),
        ({"checkpoint": {"every_rounds": 2}}, "every_rounds is 2.*the checkpoints of Trainer hold the clan"),
        ({"strategy": "pbt"}, "members on the line share one"),
    ],
    ids=["groups", "resume", "rounds", "strategy"],
)
def test_a_block(changes, match, tmp_path):
    _refused(tmp_path, ConfigError, match, config=block(**changes))


def test_a_resume_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("CLANTUNE_RESUME", "somewhere")
    _refused(tmp_path, ConfigError, "CLANTUNE_RESUME is set", config=block())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"eval_dataset": None}, "there are none. Pass eval_dataset"),
        ({"eval_dataset": {"a": Texts(8, seed=0), "b": Texts(8, seed=1)}}, r"\['a', 'b'\].*eval_data=\"a\""),
        ({"eval_dataset": Stream()}, "Stream without a length or an index"),
    ],
    ids=["batch size", "no examples", "several", "stream"],
)
def test_settings_of_trainer(settings, match, tmp_path):
    _refused(tmp_path, ConfigError, match, config=block(), **settings)


def test_a_callback_without_a_block(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _refused(tmp_path, ConfigError, 'found no "clantune" block.*there is no clan.json', callback=ClanCallback())


def test_a_checkpoint_without_a_clan(tmp_path):
    plain = trainer_of(tmp_path / "plain", max_steps=2, save_strategy="steps", save_steps=1)
    plain.train()
    trainer = trainer_of(tmp_path / "clan", ClanCallback(block()), max_steps=2)
    with pytest.raises(CheckpointError, match="checkpoint-1 holds no clan"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-1"))


def test_a_checkpoint_of_other_settings(tmp_path):
    first = trainer_of(tmp_path, ClanCallback(block()), max_steps=2, save_strategy="steps", save_steps=1)
    first.train()
    other = trainer_of(tmp_path / "other", ClanCallback(block(population_size=5)), max_steps=2)
    with pytest.raises(CheckpointError, match="population_size: 4 was saved, this launch has 5"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_batch_that_no_checkpoint_could_hold(tmp_path):
    def collate(samples):
        return torch.utils.data.default_collate(samples) | {"extra": {1, 2}}

    trainer = trainer_of(
        tmp_path, ClanCallback(block()), data_collator=collate, remove_unused_columns=False, max_steps=1
    )
    with pytest.raises(ConfigError, match="a batch holds a set"):
        trainer.train()


def test_an_optimizer_that_is_replaced_after_the_start(tmp_path):
    from transformers import TrainerCallback

    class Replacing(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            trainer.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(trainer.optimizer.optimizer, factor=1.0)

    trainer = trainer_of(tmp_path, ClanCallback(block()), callbacks=[Replacing()], max_steps=3)
    with pytest.raises(ClanError, match="the clan did not see it"):
        trainer.train()
