"""A loop by Accelerate with a clan: it is its own run, decides as the project's own loop, and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate", reason="the extra accelerate")

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

import clantune_scale
from clantune_scale.core.rounds import PhaseKind
from clantune_scale.errors import CheckpointError, ClanError, ConfigError
from clantune_scale.integrations.accelerate import attach
from tests.integrations.small_lm import SmallLm, Texts

# Warnings of the frameworks' own are shown, and do not fail a test.
pytestmark = pytest.mark.filterwarnings("default")
TRIAL = {"name": "clan", "options": {"trial_cost": 1.5, "trial_at": 0.15}}
STEPS = 40


def block(folder: Path, **changes: Any) -> dict[str, Any]:
    settings = {
        "population_size": 4,
        "round_length": 6,
        "strategy": TRIAL,
        "genes": {"lr": {}},
        "fitness": {"num_samples": 32, "batch_size": 8},
        "tracking": {"mlflow": False, "run_name": "run", "directory": str(folder), "print_every_steps": 1000},
    }
    return settings | changes


class Loop:
    """The loop of Accelerate's documentation, on a model that returns its loss."""

    def __init__(self, config: Any = None, *, dropout: float = 0.1, **changes: Any) -> None:
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        set_seed(5)
        model = SmallLm(dropout=dropout)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        # 22 batches an epoch: steps do not cross epochs.
        loader = DataLoader(Texts(88, seed=1), batch_size=4, shuffle=True)
        prepared = self.accelerator.prepare(model, optimizer, loader, scheduler)
        self.model, self.optimizer, self.loader, self.scheduler = prepared
        self.clan = None
        if config is not None:
            self.clan = attach(
                self.accelerator,
                self.model,
                self.optimizer,
                self.scheduler,
                config=config,
                eval_data=Texts(64, seed=2),
                total_steps=STEPS,
                **changes,
            )
        self.seen: list[dict[str, torch.Tensor]] = []
        self.num_steps = 0

    def train(self, until: int, *, skipped: int = 0, save: dict[int, Path] | None = None) -> None:
        skips = skipped
        while self.num_steps < until:
            loader = self.accelerator.skip_first_batches(self.loader, skips % 22) if skips else self.loader
            skips = 0
            for batch in loader:
                self.seen.append(batch)
                self.one_batch(batch)
                if not self.accelerator.sync_gradients:
                    continue
                self.num_steps += 1
                if self.num_steps in (save or {}):
                    self.accelerator.save_state(str(save[self.num_steps]))
                if self.num_steps == until:
                    return

    def one_batch(self, batch: dict[str, torch.Tensor]) -> None:
        with self.accelerator.accumulate(self.model):
            loss = self.model(**batch)["loss"]
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()


def assert_same_weights(ours, theirs) -> None:
    for (name, one), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("strategy", ["control", TRIAL], ids=["control", "clan"])
def test_the_loop_is_that_of_a_run_without_a_clan(strategy, tmp_path):
    plain, clan = Loop(), Loop(block(tmp_path, strategy=strategy))
    for loop in (plain, clan):
        set_seed(6)
        loop.train(STEPS)
    assert [batch["input_ids"].tolist() for batch in clan.seen] == [b["input_ids"].tolist() for b in plain.seen]
    assert clan.clan.num_steps == clan.num_steps == STEPS
    assert clan.scheduler.state_dict() == plain.scheduler.state_dict()
    if strategy == "control":
        assert_same_weights(clan.model, plain.model)
    else:
        kinds = {phase.kind for record in clan.clan.progress.lineage for phase in record.phases}
        assert kinds == set(PhaseKind)
    clan.clan.finish()
    assert "backward" not in vars(clan.accelerator) and "clip_grad_norm_" not in vars(clan.accelerator)


def test_its_decisions_are_those_of_the_projects_own_loop(tmp_path):
    loop = Loop(block(tmp_path / "loop"), dropout=0.0)
    loop.train(STEPS)
    model = SmallLm(dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    clan = clantune_scale.attach(
        model,
        optimizer,
        scheduler,
        config=block(tmp_path / "own", members="line"),
        eval_data=Texts(64, seed=2),
        micro_batch_size=4,
        accumulation=2,
        total_steps=STEPS,
        num_samples=88,
    )
    for step in clan.steps(loop.seen, until=STEPS):
        for batch in step:
            (model(**batch)["loss"] / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert len(clan.progress.lineage) == 4
    for ours, theirs in zip(loop.clan.progress.lineage, clan.progress.lineage, strict=True):
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-6)
        assert ours.donors == theirs.donors and ours.restored == theirs.restored
    assert loop.clan.population.genomes[0].values["lr"] == pytest.approx(clan.population.genomes[0].values["lr"])


def test_a_state_that_was_saved_goes_on_as_the_unbroken_run(tmp_path):
    saved = {4: tmp_path / "in a round", 16: tmp_path / "in a turn"}
    # No dropout and no shuffle: a loader that is entered in the middle of an epoch draws from torch's streams anew.
    whole = Loop(block(tmp_path / "whole"), dropout=0.0)
    whole.loader = whole.accelerator.prepare(DataLoader(Texts(88, seed=1), batch_size=4))
    whole.train(STEPS, save=saved)
    for step, folder in saved.items():
        part = Loop(block(tmp_path / "part"), dropout=0.0)
        part.loader = part.accelerator.prepare(DataLoader(Texts(88, seed=1), batch_size=4))
        part.accelerator.load_state(str(folder))
        part.num_steps = step
        part.train(STEPS, skipped=2 * step)
        assert part.clan.num_steps == STEPS
        assert list(part.clan.progress.lineage) == list(whole.clan.progress.lineage)
        assert_same_weights(part.model, whole.model)


def test_a_state_without_a_clan_is_refused(tmp_path):
    plain = Loop()
    plain.train(1)
    plain.accelerator.save_state(str(tmp_path / "plain"))
    with pytest.raises(CheckpointError, match="holds no clan"):
        Loop(block(tmp_path)).accelerator.load_state(str(tmp_path / "plain"))


def test_attaching_after_a_state_was_loaded_is_refused(tmp_path):
    loop = Loop()
    loop.train(1)
    with pytest.raises(ClanError, match="before the clan was attached.*load_state\\(\\) after attach"):
        attach(loop.accelerator, loop.model, loop.optimizer, config=block(tmp_path), eval_data=Texts(8, seed=2))


def test_what_was_not_prepared_is_refused(tmp_path):
    loop, config = Loop(), block(tmp_path)
    with pytest.raises(ConfigError, match="the model was not prepared"):
        attach(loop.accelerator, SmallLm(), loop.optimizer, config=config, eval_data=Texts(8, seed=2))
    bare = loop.optimizer.optimizer
    with pytest.raises(ConfigError, match="the optimizer was not prepared"):
        attach(loop.accelerator, loop.model, bare, config=config, eval_data=Texts(8, seed=2))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"members": "groups"}, '"members" is "groups"'),
        ({"checkpoint": {"resume": "latest"}}, "accelerator.load_state\\(\\) after attach"),
    ],
    ids=["groups", "resume"],
)
def test_a_block_that_the_loop_cannot_follow_is_refused(changes, match, tmp_path):
    with pytest.raises(ConfigError, match=match):
        Loop(block(tmp_path, **changes))


def test_a_loss_of_the_loops_own_needs_a_train_step(tmp_path):
    loop = Loop(block(tmp_path))
    loss = loop.model(**next(iter(loop.loader)))["loss"] * 1.0
    with pytest.raises(ConfigError, match="another loss than the model returned.*train_step"):
        loop.accelerator.backward(loss)
    without = Loop(block(tmp_path, strategy={"name": "clan", "options": {"trial_cost": 0}}))
    without.accelerator.backward(without.model(**next(iter(without.loader)))["loss"] * 1.0)


def test_trackers_get_the_figures_of_each_round(tmp_path):
    from accelerate.tracking import GeneralTracker

    class Noting(GeneralTracker):
        name, requires_logging_directory, tracker = "noting", False, None

        def __init__(self):
            super().__init__()
            self.noted: list = []

        def store_init_configuration(self, values):
            """Keeps nothing."""

        def log(self, values, step=None, **kwargs):
            self.noted.append((step, values))

    loop, noting = Loop(block(tmp_path)), Noting()
    loop.accelerator.trackers = [noting]
    loop.train(STEPS)
    loop.clan.finish()
    assert [values["clan/round"] for _, values in noting.noted] == [0, 1, 2, 3]
    assert noting.noted[0][0] == 6 and noting.noted[0][1]["clan/lr_multiplier"] != 1.0
