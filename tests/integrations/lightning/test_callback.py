"""A clan in Lightning's Trainer: against the plain Trainer, against the project's own loop, against itself resumed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("lightning", reason="the extra `lightning` is not installed")

from lightning.pytorch import Callback
from torchmetrics import MeanMetric

from clantune_scale.core.rounds import PhaseKind
from clantune_scale.errors import CheckpointError, ConfigError, EvaluationError
from clantune_scale.tracking import read_events
from tests.integrations.lightning.small import (
    ACCUMULATION,
    EPOCH,
    NUM_STEPS,
    RATE,
    TRAIN,
    VALID,
    ManualModule,
    Module,
    block,
    fit,
    loop,
    saved_state,
)

# Advice on workers and logging intervals, and names of torch's that Lightning 2.6 still uses.
pytestmark = pytest.mark.filterwarnings("ignore")
both = pytest.mark.parametrize("kind", [Module, ManualModule], ids=["automatic", "manual"])


def _assert_same(ours: Any, theirs: Any, where: str = "") -> None:
    """To the last bit, through nested containers."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            _assert_same(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            _assert_same(*pair, f"{where}/{index}")
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


def _lineage(clan: Any) -> list[tuple[Any, ...]]:
    records = clan.progress.lineage
    return [(r.start_step, [p.kind for p in r.phases], list(r.losses), r.donors, r.restored) for r in records]


@both
def test_a_control_clan_is_the_plain_trainers_run_to_the_last_bit(kind, tmp_path):
    plain, flat, _ = fit(tmp_path / "plain", None, module=kind(), num_steps=30, save_every=7)
    config = block(tmp_path / "clan", strategy="control", total_steps=30)
    tuned, trainer, _ = fit(tmp_path / "clan", config, module=kind(), num_steps=30, save_every=7)
    _assert_same(tuned.state_dict(), plain.state_dict())
    assert tuned.seen == plain.seen and len(plain.seen) > 50
    assert (trainer.global_step, trainer.current_epoch) == (flat.global_step, flat.current_epoch) == (30, 3)
    assert trainer.lr_scheduler_configs[0].scheduler.state_dict() == flat.lr_scheduler_configs[0].scheduler.state_dict()
    names = sorted(path.name for path in (tmp_path / "plain" / "saved").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "clan" / "saved").iterdir()) and len(names) == 4
    for name in names:
        _assert_same(*(saved_state(tmp_path / run / "saved" / name) for run in ("clan", "plain")))


@both
def test_the_clans_decisions_are_those_of_the_projects_own_loop(kind, tmp_path):
    _, own = loop(tmp_path, block(tmp_path))
    _, trainer, callback = fit(tmp_path, block(tmp_path), module=kind(0.0))
    clan = callback.clan
    ours, theirs = _lineage(clan), _lineage(own)
    assert {kind for _, kinds, *_ in theirs for kind in kinds} == set(PhaseKind) and len(theirs) >= 5
    assert len(ours) == len(theirs)
    for (start, kinds, losses, *decided), (start_, kinds_, losses_, *decided_) in zip(ours, theirs, strict=True):
        assert (start, kinds, decided) == (start_, kinds_, decided_)
        # The same sums in the same order, in float32; clipping is torch's in the Trainer and the clan's in the loop.
        assert losses == pytest.approx(losses_, rel=1e-5)
    rates = [c.population.genomes[0].values["lr"] for c in (clan, own)]
    assert rates[0] == pytest.approx(rates[1], rel=1e-4) and abs(rates[1] - 1) > 0.1
    assert trainer.global_step == clan.num_steps == NUM_STEPS
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == NUM_STEPS


@both
def test_a_turn_trains_on_the_whole_batch_at_the_step_that_it_repeats(kind, tmp_path):
    plain, *_ = fit(tmp_path, None, module=kind())
    module, _, callback = fit(tmp_path, block(tmp_path), module=kind())
    (phase,) = [p for r in callback.clan.progress.lineage for p in r.phases if p.kind is PhaseKind.COMPETITIVE]
    (start,) = [r.start_step for r in callback.clan.progress.lineage if phase in r.phases]
    repeated = [seen for seen in plain.seen if start <= seen[0] < start + phase.num_steps]
    after = plain.seen.index(repeated[-1]) + 1
    num_turns = (len(module.seen) - len(plain.seen)) // len(repeated)
    # The Trainer's own steps first, then three competitors more: equal batches, at the same steps of the Trainer.
    assert num_turns == 3 and len(repeated) > ACCUMULATION * (phase.num_steps - 2)
    assert module.seen == plain.seen[:after] + repeated * num_turns + plain.seen[after:]


# Before the trial, at its start, in its middle across an epoch's end, after it.
@pytest.mark.parametrize("step", [7, 10, 14, 33])
def test_a_run_that_goes_on_from_the_trainers_checkpoint_is_the_unbroken_one(step, unbroken, tmp_path):
    folder, whole, callback = unbroken
    torch.manual_seed(99)
    path = folder / "saved" / f"step={step}.ckpt"
    module, trainer, again = fit(tmp_path, block(tmp_path), module=Module(0.0), num_steps=38, ckpt_path=path)
    assert trainer.global_step == 38
    _assert_same(module.state_dict(), whole.state_dict())
    assert _lineage(again.clan) == _lineage(callback.clan)
    assert again.clan.population == callback.clan.population
    resumed = [e["step"] for e in read_events(again.clan.recorder.run_dir / "events.jsonl") if e["kind"] == "resume"]
    assert resumed == [step]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run with a checkpoint after each step; without dropout, since the Trainer's hold no random streams."""
    folder = tmp_path_factory.mktemp("whole")
    module, _, callback = fit(folder, block(folder), module=Module(0.0), num_steps=38, save_every=1)
    return folder, module, callback


class Noisy(Module):
    """Logs a mean and a metric object; warms its rate up by the Trainer's step."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.metric = MeanMetric()
        self.own: list[float] = []
        self.rates: set[tuple[int, float]] = set()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        loss = super().training_step(batch, batch_idx)
        self.metric.update(loss.detach())
        self.log("epoch_loss", loss, on_step=False, on_epoch=True, batch_size=1)
        if "log" not in vars(self):  # beside training, logging goes nowhere
            self.own.append(float(loss))
        return {"loss": loss}

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (self.trainer.global_step + 1) / 20)
        self.rates.add((self.trainer.global_step, optimizer.param_groups[0]["lr"]))
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=RATE)


def test_turns_leave_no_trace_in_metrics_and_take_the_rates_of_their_steps(tmp_path):
    module, trainer, callback = fit(tmp_path, block(tmp_path), module=Noisy(), num_steps=35, profiler="simple")
    assert len(module.seen) > len(module.own) == 2 * EPOCH + 18  # 13 steps in an epoch of 25 micro-batches
    assert module.metric._update_count == len(module.own)
    assert float(module.metric.compute()) == pytest.approx(sum(module.own) / len(module.own), rel=1e-5)
    last = module.own[2 * EPOCH :]
    assert float(trainer.callback_metrics["epoch_loss"]) == pytest.approx(sum(last) / len(last), rel=1e-5)
    assert module.rates == {(step, RATE * min(1.0, (step + 1) / 20)) for step in range(35)}
    assert "log" not in vars(module) and type(trainer.profiler).__name__ == "SimpleProfiler"
    assert float(trainer.callback_metrics["clan/validation_loss"]) > 0 and callback.clan.num_steps == 35


class Returning(Module):
    """``validation_step`` returns what it is told to, and logs two numbers."""

    def __init__(self, kind: str) -> None:
        super().__init__(0.0)
        self.kind = kind

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        loss = self.net(*batch)
        self.log("val_loss", loss)
        self.log("val_other", -loss)
        return {"loss": loss, "dict": {"loss": loss}, "pair": (loss, loss), "nothing": None}[self.kind]


def _first_loss(tmp_path: Any, kind: str, **callback: Any) -> float:
    config = block(tmp_path, strategy="control", total_steps=3)
    return float(fit(tmp_path, config, module=Returning(kind), num_steps=1, callback=callback)[2].clan.fitness.mean[0])


def test_the_loss_is_what_the_user_says_it_is(tmp_path):
    with torch.no_grad():
        true = float(Module(0.0).net(*VALID.tensors))
    for kind, callback in {
        "loss": {},
        "dict": {},
        "nothing": {"monitor": "val_loss"},
        "pair": {"evaluate": lambda module, batch: module.net(*batch)},
    }.items():
        assert _first_loss(tmp_path, kind, **callback) == pytest.approx(true, rel=1e-5), kind
    assert _first_loss(tmp_path, "loss", eval_data=TRAIN) != pytest.approx(true, rel=1e-3)
    for kind in ("nothing", "pair"):
        with pytest.raises(EvaluationError, match="which number is the loss"):
            _first_loss(tmp_path, kind)
    with pytest.raises(EvaluationError, match="logs .'val_loss', 'val_other'., and monitor is 'loss'"):
        _first_loss(tmp_path, "loss", monitor="loss")


class Drawing(Module):
    def training_step(self, dataloader_iter: Any) -> torch.Tensor:
        batch, _, _ = next(dataloader_iter)
        return self.net(*batch)


class Searching(Module):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


REFUSED = {
    "groups": ({"members": "groups"}, {}, '"members" is "groups", whose members are worlds of their own'),
    "rounds on disk": ({"checkpoint": {"resume": "latest"}}, {}, "a clan resumes with the loop, which it cannot move"),
    "own batches": ({}, {"module": Drawing(0.0)}, "draws its batches itself"),
    "line search": ({}, {"module": Searching(0.0)}, "LBFGS calls its closure several times"),
    "no validation": ({}, {"limit_val_batches": 0}, "the Trainer has none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_tuned_in_the_trainer_is_refused_before_the_first_step(case, tmp_path):
    changes, options, says = REFUSED[case]
    with pytest.raises(ConfigError, match=says):
        fit(tmp_path, block(tmp_path, **changes), **options)


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps: 3, and the Trainer has 2"),
        ({"train_micro_batch_size_per_gpu": 3}, "train_micro_batch_size_per_gpu: 3, and the Trainer has 4"),
        ({"gradient_clipping": 0.5}, "it is the Trainer that clips"),
    ],
)
def test_a_config_that_contradicts_the_trainer_is_refused(written, says, tmp_path):
    with pytest.raises(ConfigError, match=says):
        fit(tmp_path, {**written, "clantune": block(tmp_path)})


def test_a_checkpoint_after_the_end_holds_the_clan_and_one_without_a_clan_is_refused(tmp_path):
    class Last(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "last.ckpt")

    config = block(tmp_path)
    _, _, first = fit(tmp_path, config, module=Module(0.0), num_steps=8, callbacks_after=[Last()])
    _, trainer, callback = fit(tmp_path, config, module=Module(0.0), num_steps=12, ckpt_path=tmp_path / "last.ckpt")
    assert trainer.global_step == callback.clan.num_steps == 12
    assert _lineage(callback.clan)[:1] == _lineage(first.clan)[:1]
    fit(tmp_path, None, module=Module(0.0), num_steps=8, callbacks_after=[Last()])
    with pytest.raises(CheckpointError, match="last.ckpt holds no clan: it was saved without one"):
        fit(tmp_path, config, module=Module(0.0), num_steps=12, ckpt_path=tmp_path / "last.ckpt")


def test_an_error_in_training_ends_the_run_and_takes_the_hooks_off(tmp_path):
    class Breaking(Module):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if self.trainer.global_step == 3:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    module = Breaking(0.0)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, block(tmp_path), module=module)
    (events,) = tmp_path.glob("*/events.jsonl")
    assert read_events(events)[-1]["status"] == "FAILED"
    optimizer = module.optimizers(use_pl_optimizer=False)
    assert not optimizer._optimizer_step_pre_hooks and "training_step" not in vars(module.trainer.strategy)
