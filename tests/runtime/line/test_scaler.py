"""Loops that scale the loss: torch's GradScaler, whose skipped steps are no steps of the run."""

from __future__ import annotations

import pytest
import torch

from clantune_scale.core.rounds import PhaseKind
from clantune_scale.errors import ConfigError
from tests.runtime.line.test_optimizers import Net, attach, data


def _scaler() -> torch.amp.GradScaler:
    # A scale that overflows float32 some times before it fits, and again when it has grown.
    return torch.amp.GradScaler("cpu", init_scale=2.0**120, growth_interval=7)


def _train(clan, model, optimizer, scaler, until):
    scales, skipped = [], 0
    for step in clan.steps(clan.loader(data()), until=until):
        for batch in step:
            scaler.scale(2.0**20 * model(*batch)).backward()
        before = clan.num_steps
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        skipped += clan.num_steps == before
        scales.append(scaler.get_scale())
    return scales, skipped


def _run(directory, **block):
    model = Net()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    scaler = _scaler()
    clan = attach(directory, model, optimizer, scaler=scaler, **block)
    return clan, model, optimizer, scaler


def test_steps_that_a_scaler_skips_are_not_counted_and_turns_repeat_the_others(tmp_path):
    clan, model, optimizer, scaler = _run(tmp_path)
    _, skipped = _train(clan, model, optimizer, scaler, 45)
    assert skipped > 2 and clan.num_steps == 45
    assert int(optimizer.state[model.out.weight]["step"]) == 45
    rounds = list(clan.progress.lineage)
    assert any(phase.kind is PhaseKind.COMPETITIVE for record in rounds for phase in record.phases)
    assert all(loss is not None for record in rounds for loss in record.losses)


def test_a_turn_starts_with_the_scale_of_its_phase(tmp_path):
    clan, model, optimizer, scaler = _run(tmp_path)
    starts = []
    for step in clan.steps(clan.loader(data()), until=31):
        position = clan.phases.position
        if position.phase.kind is PhaseKind.COMPETITIVE and position.starts_phase:
            starts.append((scaler.get_scale(), scaler._get_growth_tracker()))
        for batch in step:
            scaler.scale(2.0**20 * model(*batch)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert len(starts) == 4 and len(set(starts)) == 1


def test_the_scale_is_a_part_of_a_stopped_run(tmp_path):
    tracking = {"directory": str(tmp_path), "mlflow": False, "print_every_steps": 1000, "run_name": "scaled"}
    clan, model, optimizer, scaler = _run(tmp_path, tracking=tracking)
    _train(clan, model, optimizer, scaler, 8)
    saved = scaler.get_scale(), scaler._get_growth_tracker()
    clan.stop()
    again, _, _, fresh = _run(tmp_path, tracking=tracking, checkpoint={"resume": str(clan.recorder.run_dir)})
    assert (fresh.get_scale(), fresh._get_growth_tracker()) == saved and again.num_steps == 8


def test_a_scaler_that_the_clan_does_not_know_is_refused_at_the_first_step(tmp_path):
    model = Net()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    clan = attach(tmp_path, model, optimizer)
    with pytest.raises(ConfigError, match=r"attach\(\.\.\., scaler=scaler\)"):
        _train(clan, model, optimizer, torch.amp.GradScaler("cpu", init_scale=2.0), 3)
