"""Trainer with a clan: what it sees is its own run's, the decisions are the project's own loop's, and it resumes."""

from __future__ import annotations

import inspect
import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", reason="the extra transformers")

from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

import clantune_scale
from clantune_scale.core.rounds import PhaseKind
from clantune_scale.integrations.transformers import ClanCallback
from clantune_scale.tracking import read_events
from tests.integrations.small_lm import SmallLm
from tests.integrations.transformers.runs import STEPS, block, trainer_of

# Warnings of the frameworks' own are shown, and do not fail a test.
pytestmark = pytest.mark.filterwarnings("default")


def assert_same_weights(ours, theirs) -> None:
    for (name, one), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def ids(trainer) -> list[list]:
    return [[batch["input_ids"].tolist() for batch in step] for step in trainer.seen]


def files(folder) -> set[str]:
    """Below an output folder, without the clan's own."""
    paths = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {path for path in paths if not path.startswith("clan_runs/") and "/clan/" not in path}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run of 40 steps with a checkpoint every 4."""
    folder, callback = tmp_path_factory.mktemp("unbroken"), ClanCallback(block())
    trainer = trainer_of(folder, callback, save_strategy="steps", save_steps=4)
    trainer.train()
    return trainer, callback, folder


def test_a_control_clan_is_the_run_without_a_clan_to_the_last_bit(tmp_path):
    # 23 batches an epoch: each epoch's last step has one micro-batch in place of two.
    settings = {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "epoch", "eval_strategy": "epoch"}
    plain = trainer_of(tmp_path / "plain", **settings)
    plain.train()
    callback = ClanCallback(block(strategy="control"))
    control = trainer_of(tmp_path / "clan", callback, **settings)
    control.train()
    assert_same_weights(control.model, plain.model)
    assert len(callback.clan.progress.lineage) == 4 and callback.clan.num_steps == 24
    assert ids(control) == ids(plain)
    assert control.state.global_step == plain.state.global_step == 24
    assert control.lr_scheduler.last_epoch == plain.lr_scheduler.last_epoch == 24
    assert control.state.epoch == plain.state.epoch == 2
    logs, expected = (
        [
            {name: log[name] for name in ("loss", "grad_norm", "learning_rate", "eval_loss", "step") if name in log}
            for log in trainer.state.log_history
            if "loss" in log or "eval_loss" in log
        ]
        for trainer in (control, plain)
    )
    assert logs == expected
    assert files(tmp_path / "clan") == files(tmp_path / "plain")
    # The clan's figures must not be saved in the scheduler's or the optimizer's state, or keep it from being saved.
    ours, theirs = (
        torch.load(tmp_path / name / "checkpoint-24" / "scheduler.pt", weights_only=True) for name in ("clan", "plain")
    )
    assert ours == theirs


def test_its_decisions_are_those_of_the_projects_own_loop(tmp_path):
    callback = ClanCallback(block())
    trainer = trainer_of(tmp_path / "trainer", callback, model=SmallLm(dropout=0.0))
    trainer.train()
    own = trainer_of(tmp_path / "own", model=SmallLm(dropout=0.0))
    own.create_optimizer_and_scheduler(STEPS)
    model, optimizer, scheduler = own.model, own.optimizer, own.lr_scheduler

    def num_items_of(batches):
        return own._get_num_items_in_batch(batches, torch.device("cpu"))

    config = block(members="line", tracking=block()["tracking"] | {"directory": str(tmp_path / "runs")})
    clan = clantune_scale.attach(
        model,
        optimizer,
        scheduler,
        config=config,
        eval_data=own.eval_dataset,
        micro_batch_size=4,
        accumulation=2,
        total_steps=STEPS,
        num_samples=len(own.train_dataset),
        evaluate=lambda model, batch: model(**batch, num_items_in_batch=num_items_of([batch]))["loss"],
    )
    # The loop of this project has two micro-batches in each step: an epoch's last step has one more of no tokens.
    batches = [batch for step in trainer.seen for batch in (step if len(step) == 2 else [*step, _empty(step[0])])]
    for step in clan.steps(batches, until=STEPS):
        micro = list(step)
        num_items = num_items_of(micro)
        for batch in micro:
            model(**batch, num_items_in_batch=num_items)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    kinds = {phase.kind for record in clan.progress.lineage for phase in record.phases}
    assert kinds == set(PhaseKind) and len(clan.progress.lineage) == 4
    for ours, theirs in zip(callback.clan.progress.lineage, clan.progress.lineage, strict=True):
        # The same sums of float32, and gradients of zero beside them.
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
        assert ours.donors == theirs.donors and ours.restored == theirs.restored
    ours, theirs = (one.population.genomes[0].values["lr"] for one in (callback.clan, clan))
    assert ours == pytest.approx(theirs, rel=1e-3) and abs(theirs - 1) > 0.1


def _empty(batch):
    return {"input_ids": batch["input_ids"], "labels": torch.full_like(batch["labels"], -100)}


def test_its_loop_has_the_batches_steps_and_rates_of_a_run_without_turns(unbroken, tmp_path):
    trainer, callback, _ = unbroken
    plain = trainer_of(tmp_path)
    plain.train()
    assert any(p.kind is PhaseKind.COMPETITIVE for record in callback.clan.progress.lineage for p in record.phases)
    assert ids(trainer) == ids(plain)
    assert trainer.state.global_step == callback.clan.num_steps == trainer.lr_scheduler.last_epoch == STEPS
    rates, expected = (
        [log["learning_rate"] for log in one.state.log_history if "learning_rate" in log] for one in (trainer, plain)
    )
    assert rates == expected


def test_a_collator_that_draws_gives_the_batches_of_a_run_without_turns(tmp_path):
    def masking(samples):
        batch = torch.utils.data.default_collate(samples)
        hidden = torch.rand(batch["input_ids"].shape) < 0.2
        return batch | {"input_ids": batch["input_ids"].masked_fill(hidden, 0)}

    runs = []
    for name, callback in (("plain", None), ("clan", ClanCallback(block(), eval_data=_texts()))):
        # A Trainer seeds the streams when it is made.
        runs.append(trainer_of(tmp_path / name, callback, data_collator=masking, eval_dataset=None))
        runs[-1].train()
    assert ids(runs[0]) == ids(runs[1])


def _texts():
    from tests.integrations.small_lm import Texts

    return Texts(64, seed=2)


def test_every_competitor_trains_on_the_whole_batch(tmp_path):
    class Counting(SmallLm):
        num_forward = 0

        def forward(self, input_ids, labels=None, num_items_in_batch=None):
            self.num_forward += self.training
            return super().forward(input_ids, labels, num_items_in_batch)

    callback = ClanCallback(block())
    trainer = trainer_of(tmp_path, callback, model=Counting())
    trainer.train()
    # Of four competitors, one trains in the loop itself.
    in_turns = sum(len(step) for step in trainer.seen[6:26])
    assert trainer.model.num_forward == sum(map(len, trainer.seen)) + 3 * in_turns


@pytest.mark.parametrize("step", [4, 16], ids=["inside a round", "inside a turn"])
def test_a_resume_equals_the_unbroken_run(unbroken, step, tmp_path):
    trainer, callback, folder = unbroken
    again = ClanCallback(block())
    resumed = trainer_of(tmp_path, again, save_steps=4)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert_same_weights(resumed.model, trainer.model)
    assert resumed.state.global_step == again.clan.num_steps == STEPS
    assert list(again.clan.progress.lineage) == list(callback.clan.progress.lineage)
    assert again.clan.population == callback.clan.population
    events = list(read_events(again.summary.run_dir / "events.jsonl"))
    (resume,) = [event for event in events if event["kind"] == "resume"]
    assert resume["step"] == step and resume["resumed_from"] == str(folder / f"checkpoint-{step}" / "clan")
    schedules = [json.loads((one.summary.run_dir / "schedule.json").read_text()) for one in (again, callback)]
    assert schedules[0] == schedules[1]


def test_early_stopping_ends_the_run_where_it_ends_without_a_clan(tmp_path):
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 5,
        "save_strategy": "steps",
        "save_steps": 5,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,  # the loss falls, so that the first evaluation stays the best
    }
    stopped = {}
    for name, callback in (("plain", None), ("clan", ClanCallback(block()))):
        trainer = trainer_of(tmp_path / name, callback, callbacks=[EarlyStoppingCallback(1)], **settings)
        trainer.train()
        stopped[name] = trainer.state.global_step, trainer.state.best_model_checkpoint.rpartition("/")[2]
    assert stopped["clan"] == stopped["plain"] == (10, "checkpoint-5")
    *_, end = read_events(callback.summary.run_dir / "events.jsonl")
    assert end["kind"] == "run_end" and end["status"] == "FINISHED" and end["step"] == 10


def test_reporters_get_the_figures_of_each_round(tmp_path):
    class Reporter(TrainerCallback):
        logs: list = []  # noqa: RUF012 - one test's

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.logs.append((state.global_step, dict(logs)))

    callback = ClanCallback(block())
    trainer = trainer_of(tmp_path, callback, callbacks=[Reporter()], max_steps=30)
    trainer.train()
    rounds = {step: logs for step, logs in Reporter.logs if "clan/round" in logs}
    lineage = callback.clan.progress.lineage
    assert list(rounds) == [record.end_step for record in lineage]
    assert [logs["clan/round"] for logs in rounds.values()] == list(range(len(lineage)))
    for record, logs in zip(lineage, rounds.values(), strict=True):
        assert logs["clan/validation_loss"] == min(record.losses)
    assert rounds[6]["clan/lr_multiplier"] != 1.0
    # At the rate that training goes on with: the schedule's times the gene's times the final decay's.
    scheduled = 5e-3 * (30 - 6) / (30 - 3)
    assert rounds[6]["clan/learning_rate"] == pytest.approx(scheduled * rounds[6]["clan/lr_multiplier"])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_members_are_compared_by_the_loss_that_trainer_evaluates(smoothing, tmp_path):
    callback = ClanCallback(block(fitness={"num_samples": 64, "batch_size": 8}, strategy="control"))
    model = SmallLm()
    model.config = SimpleNamespace()  # Trainer reads it if it smooths labels
    trainer = trainer_of(
        tmp_path, callback, model=model, max_steps=2, label_smoothing_factor=smoothing, per_device_eval_batch_size=8
    )
    trainer.train()
    assert callback.summary.champion_loss == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)


def test_a_loss_function_of_the_users_own_is_measured_by_its_items(tmp_path):
    def summed(outputs, labels, num_items_in_batch):
        logits = outputs["logits"].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum") / num_items_in_batch

    callback = ClanCallback(block(fitness={"num_samples": 64, "batch_size": 8}, strategy="control"))
    trainer = trainer_of(tmp_path, callback, max_steps=2, compute_loss_func=summed, per_device_eval_batch_size=8)
    trainer.train()
    assert callback.summary.champion_loss == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)


def test_a_threshold_that_members_compete_by_is_what_trainer_clips_at(tmp_path):
    thresholds = []

    class Clipping(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            clip = trainer.accelerator._clip_grad_norm_dtensor_aware

            def clip_noted(parameters, max_norm, **kwargs):
                thresholds.append(max_norm)
                return clip(parameters, max_norm, **kwargs)

            trainer.accelerator._clip_grad_norm_dtensor_aware = clip_noted

    genes = {"clip": {"step_size": 0.5, "kind": "specialized"}}
    strategy = {"name": "clan", "options": {"trial_cost": 0}}
    callback = ClanCallback(block(genes=genes, duty_cycle=0.34, strategy=strategy))
    trainer = trainer_of(tmp_path, callback, callbacks=[Clipping()], max_steps=12, max_grad_norm=0.5)
    trainer.train()
    values = [genome.values["clip"] for genome in callback.clan.progress.lineage[0].genomes]
    assert len(set(values)) > 1 and set(values) <= set(thresholds)


def test_the_block_is_found_in_the_working_directory_and_members_are_on_the_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clan.json").write_text(json.dumps({"clantune": block(strategy="control")}))
    callback = ClanCallback()
    trainer_of(tmp_path / "out", callback, max_steps=2).train()
    assert callback.clan.config.members == "line"
    assert callback.summary.run_dir == tmp_path / "out" / "clan_runs" / "run"


def test_trainer_still_has_what_the_callback_uses():
    """Private names: a new version of transformers fails here and not in training."""
    assert "resume_from_checkpoint" in inspect.signature(Trainer._inner_training_loop).parameters
    source = inspect.getsource(Trainer._inner_training_loop)
    assert source.index("_prepare_for_training") < source.index("on_train_begin") < source.index("_run_epoch")
    step = list(inspect.signature(Trainer.training_step).parameters)
    assert step == ["self", "model", "inputs", "num_items_in_batch"]
    names = ("_get_num_items_in_batch", "_prepare_inputs", "_clip_grad_norm", "_get_grad_norm", "_get_output_dir")
    assert all(callable(getattr(Trainer, name)) for name in names)
    epoch = inspect.getsource(Trainer._run_epoch)
    for call in ("current_gradient_accumulation_steps", "_set_sync_gradients", "self.optimizer.step()", "zero_grad()"):
        assert call in epoch
