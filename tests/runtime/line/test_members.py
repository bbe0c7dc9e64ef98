"""A clan on the line in one process, without a process group: against its reference twin, and against a plain run."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.data import TensorDataset

import clantune_scale
from clantune_scale.core.genome import Gene
from clantune_scale.core.line import averaging_weights
from clantune_scale.core.rounds import PhaseKind
from clantune_scale.errors import ClanError, ConfigError
from clantune_scale.tracking import read_events
from tests.small_references import DROPOUT, LR, SAMPLES, clan_of, network, samples, squared_error, strategy_of

DECAY = Gene("weight_decay", relative=True, max_change=0.3)
#: A trial of four competitors, long enough to be held in a run of 120 steps.
TRIAL = {"trial_cost": 0.6, "trial_at": 0.15}


def adamw(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.004, weight_decay=0.1)


def falling(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.995)


class WithLoss(torch.nn.Module):
    """Returns its loss, which the clan sees."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs, targets):
        return squared_error(self.inner, (inputs, targets))


class Run:
    """A loop of a user's own, in one process; the reference clan's batches, in its order."""

    def __init__(self, directory, module=None, *, population=4, changes=None, **block) -> None:
        self.model = WithLoss(module or network())
        self.optimizer = adamw(self.model.parameters())
        self.scheduler = falling(self.optimizer)
        held_out = [samples(900 + i) for i in range(3)]
        config = {
            "population_size": population,
            "members": "line",
            "round_length": 6,
            "seed": 3,
            "duty_cycle": 0.34,
            "fitness": {"num_samples": 3 * SAMPLES, "batch_size": SAMPLES},
            "tracking": {"directory": str(directory), "mlflow": False, "print_every_steps": 1000},
        }
        self.num_drawn = 0
        self.clan = clantune_scale.attach(
            self.model,
            self.optimizer,
            self.scheduler,
            config=config | block,
            eval_data=TensorDataset(*(torch.cat(parts) for parts in zip(*held_out, strict=True))),
            micro_batch_size=SAMPLES,
            accumulation=4,
            gradient_clipping=1.0,
            **(changes or {}),
        )

    def batches(self):
        """Endless; four micro-batches a step, each a member's in the reference clan."""
        while True:
            step = self.clan.phases.position.step
            is_common = self.clan.phases.position.phase.kind is PhaseKind.COMPETITIVE
            for index in range(4):
                self.num_drawn += 1
                yield samples(step, index, 0) if is_common else samples(step, 0, index)

    def one_step(self, batches) -> None:
        for batch in batches:
            (self.model(*batch) / 4).backward()
        self.clan.clip_grad_norm_()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def train(self, num_steps: int) -> None:
        for step in self.clan.steps(self.batches(), until=num_steps):
            self.one_step(step)

    @property
    def lineage(self):
        return self.clan.progress.lineage


def twin(name: str, *genes: Gene, num_steps: int, module=network, **options):
    settings = {"optimizer": adamw, "scheduler": falling, "clip": 1.0}
    clan = clan_of(strategy_of(name, *genes, **options), module(), members="line", **settings)
    torch.manual_seed(0)
    clan.run(num_steps)
    return clan


@pytest.mark.parametrize("store", ["device", "host"])
@pytest.mark.parametrize("genes", [(LR,), (LR, DECAY)], ids=["rate", "rate and decay"])
def test_a_run_without_a_process_group_equals_the_reference_twin(genes, store, tmp_path):
    names = {gene.name: {"max_change": gene.max_change} for gene in genes}
    run = Run(
        tmp_path, genes=names, total_steps=120, strategy={"name": "clan", "options": TRIAL}, line={"store": store}
    )
    run.train(60)
    reference = twin("clan", *run.clan.genes, num_steps=60, total=120, **TRIAL)
    kinds = {phase.kind for record in reference.lineage for phase in record.phases}
    assert kinds == set(PhaseKind) and len(run.lineage) == len(reference.lineage)
    for ours, theirs in zip(run.lineage, reference.lineage, strict=True):
        # The same sums in float64, micro-batches in the same order: the order of a few additions differs.
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-9)
        assert ours.donors == theirs.donors and ours.restored == theirs.restored
    for gene in genes:
        ours, theirs = (c.population.genomes[1].values[gene.name] for c in (run.clan, reference))
        assert ours == pytest.approx(theirs, rel=1e-7)
    for ours, theirs in zip(run.model.parameters(), reference.members[0].parameters, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    assert abs(math.log(run.clan.population.genomes[0].values["lr"])) > 0.05


def test_a_loop_sees_the_steps_the_batches_and_the_schedule_of_a_run_without_a_clan(tmp_path):
    run = Run(tmp_path, total_steps=120, strategy={"name": "clan", "options": TRIAL})
    run.train(60)
    assert len(run.lineage) >= 3 and any(p.kind is PhaseKind.COMPETITIVE for r in run.lineage for p in r.phases)
    assert run.num_drawn == 4 * 60
    assert run.clan.num_steps == run.scheduler.last_epoch == 60
    assert int(run.optimizer.state_dict()["state"][0]["step"]) == 60


def test_turns_by_a_callable_are_the_turns_of_the_loop(tmp_path):
    options = {"total_steps": 120, "strategy": {"name": "clan", "options": TRIAL}}
    first = Run(tmp_path / "steps", **options)
    first.train(60)

    def train_step(calls) -> None:
        second.one_step([args for args, _ in calls])

    second = Run(tmp_path / "callable", changes={"train_step": train_step}, **options)
    batches = second.batches()
    for _ in range(60):
        second.one_step([next(batches) for _ in range(4)])
    for ours, theirs in zip(second.lineage, first.lineage, strict=True):
        assert ours.losses == theirs.losses and ours.genomes == theirs.genomes
    for ours, theirs in zip(second.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_loop_that_gives_no_turns_is_told_so_at_its_first_step(tmp_path):
    run = Run(tmp_path, total_steps=120, strategy={"name": "clan", "options": TRIAL})
    with pytest.raises(ConfigError, match=r"clan\.steps\(loader\).*train_step.*trial_cost"):
        run.one_step([samples(0, 0, index) for index in range(4)])


def test_a_train_step_that_does_not_step_is_named(tmp_path):
    changes = {"train_step": lambda calls: None}
    run = Run(tmp_path, total_steps=120, strategy={"name": "clan", "options": TRIAL}, changes=changes)
    batches = run.batches()
    with pytest.raises(ClanError, match="train_step took no optimizer step"):
        for _ in range(60):
            run.one_step([next(batches) for _ in range(4)])


def test_a_control_clan_is_the_plain_run_to_the_last_bit(tmp_path):
    run = Run(tmp_path, strategy="control", total_steps=20)
    run.train(20)
    plain = network()
    optimizer = adamw(plain.parameters())
    scheduler = falling(optimizer)
    for step in range(20):
        for index in range(4):
            (squared_error(plain, samples(step, 0, index)) / 4).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), run.model.parameters(), strict=True))


def test_a_specialized_gene_is_tried_in_turns_and_its_weights_are_discarded(tmp_path):
    genes = {"dropout": {"kind": "specialized", "initial": 0.1, "step_size": 0.05, "bounds": [0.0, 0.5]}}
    run = Run(tmp_path, network(0.1), genes=genes, total_steps=60, strategy="clan")
    torch.manual_seed(0)
    run.train(24)
    reference = twin("clan", DROPOUT, num_steps=24, module=lambda: network(0.1), total=60)
    assert any(phase.kind is PhaseKind.COMPETITIVE for record in run.lineage for phase in record.phases)
    assert len({tuple(record.losses) for record in run.lineage}) > 1
    assert [r.phases for r in run.lineage] == [r.phases for r in reference.lineage]
    # Each turn is on the whole batch and with the same activations dropped, in both.
    for ours, theirs in zip(run.lineage, reference.lineage, strict=True):
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-9)
    assert len(set(run.lineage[0].losses)) == 4
    assert run.clan.num_steps == run.scheduler.last_epoch == 24


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"strategy": "pbt"}, "'pbt' lets members hold states of their own"),
        ({"strategy": {"name": "control", "options": {"competes": True}}}, "states of their own"),
        ({"genes": ["lr", "beta1"]}, "gene 'beta1'.*no closed form"),
        ({"genes": ["lr", "accumulation"]}, "gene 'accumulation'.*same micro-batches"),
        ({"faults": {"min_members": 2}}, "faults.min_members is 2"),
    ],
    ids=["pbt", "competing control", "beta1", "accumulation", "min_members"],
)
def test_what_the_line_cannot_do_is_refused_by_name_before_the_first_step(block, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        Run(tmp_path, total_steps=120, **block)


def test_a_decay_that_is_not_linear_is_refused(tmp_path):
    model = network()
    with pytest.raises(ConfigError, match="gene 'weight_decay': Adam does not apply its weight decay"):
        clantune_scale.attach(
            model,
            torch.optim.Adam(model.parameters(), weight_decay=0.1),
            config={
                "population_size": 4,
                "members": "line",
                "genes": ["lr", "weight_decay"],
                "tracking": {"directory": str(tmp_path), "mlflow": False},
            },
            eval_data=TensorDataset(*samples(1)),
            evaluate=squared_error,
            micro_batch_size=SAMPLES,
        )


def test_the_run_is_recorded_as_one_of_members_and_its_champion_loads(tmp_path):
    run = Run(tmp_path, total_steps=30, strategy={"name": "clan", "options": {"trial_cost": 0}})
    run.train(30)
    summary = run.clan.finish()
    events = list(read_events(summary.run_dir / "events.jsonl"))
    start = events[0]
    assert start["population_size"] == 4 and start["members"] == "line" and len(start["member_ranks"]) == 4
    ended = [event for event in events if event["kind"] == "round_end"]
    assert all(len(event["members"]) == 4 for event in ended)
    rates = [ended[0]["learning_rates"], [m["genome"]["values"]["lr"] for m in ended[0]["members"]]]
    assert rates[0][1] / rates[0][0] == pytest.approx(rates[1][1] / rates[1][0])
    assert summary.champion == 0 and math.isfinite(summary.champion_loss)
    assert len(run.clan.evaluate(TensorDataset(*samples(7)))) == 4


@pytest.mark.parametrize("store", ["device", "host"])
def test_an_average_of_every_fourth_step_measures_points_of_its_own_line(store, tmp_path):
    """Against the formulas by hand: updates after steps 4 and 6 of a round of six, and each member's point."""
    line = {"store": store, "average_every": 4, "go_on_from": "centre"}
    strategy = {"name": "clan", "options": {"trial_cost": 0}}
    run = Run(tmp_path, genes={"lr": {}}, total_steps=120, strategy=strategy, line=line)
    rates = [genome.values["lr"] for genome in run.clan.population.genomes]
    weights = [[p.detach().clone() for p in run.model.parameters()]]
    for step in run.clan.steps(run.batches(), until=6):
        run.one_step(step)
        weights.append([p.detach().clone() for p in run.model.parameters()])
    plan = run.clan.phases.clock.round(0)
    shares = averaging_weights(plan, every=4)
    assert [bool(share) for share in shares] == [False, False, False, True, False, True]
    average = weights[0]
    for share, now in zip(shares, weights[1:], strict=True):
        average = [a.lerp(w, share) for a, w in zip(average, now, strict=True)]
    centre = sum(rates) / 4
    for member, rate in enumerate(rates):
        for p, start, own in zip(run.model.parameters(), weights[0], average, strict=True):
            p.data.copy_(start + rate / centre * (own - start))  # the average began at the start
        by_hand = sum(float(run.model(*samples(900 + i)).detach()) for i in range(3)) / 3
        assert run.lineage[0].losses[member] == pytest.approx(by_hand, rel=1e-12)
