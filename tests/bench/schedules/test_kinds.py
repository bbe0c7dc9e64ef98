from __future__ import annotations

import json
from importlib import resources

import pytest
import torch

from clantune_scale.bench.schedules.oracle import Oracle
from clantune_scale.bench.schedules.problems import kinds
from clantune_scale.bench.schedules.suite import ALL, KINDS, STUDY
from tests.bench.schedules.tiny_problem import TINY

pytest.importorskip("sklearn", reason="most kinds build on the digits, which come with scikit-learn")


def test_what_only_starts_wrong_has_the_oracle_of_what_starts_right():
    for wrong in (kinds.wrong_clip, kinds.wrong_momentum, kinds.wrong_weight_decay):
        assert wrong(TINY).fingerprint() == TINY.fingerprint()
        assert all(start.changes for start in wrong(TINY).starts)
        assert len(wrong(TINY).extra_genes) == 1
    assert kinds.scheduled(TINY, "wsd").fingerprint() == TINY.fingerprint()
    assert kinds.endless(TINY).fingerprint() == TINY.fingerprint()
    assert kinds.longer(TINY, 3).fingerprint() != TINY.fingerprint()


def test_every_kind_has_a_name_of_its_own():
    names = [ALL[key]().name for key in ALL]
    assert len(set(names)) == len(ALL) > len(KINDS) >= 9


def test_all_kinds_have_their_oracle_in_the_package():
    """By name: other data (another Python's library, for bytes) has another fingerprint, and is computed anew."""
    folder = resources.files("clantune_scale.bench.schedules") / "oracles"
    bundled = {Oracle.from_json(json.loads(file.read_text())).problem for file in folder.iterdir()}
    others = {"dropout", "label-noise", "shift", "longer-3", "longer-10", "far-too-small"}  # the rest are the study's
    others |= {"small-accumulation", "large-accumulation"}
    assert bundled == {ALL[key]().name for key in {*STUDY, *others}}


def test_three_labels_in_ten_are_noise():
    noisy, clean = kinds.NoisyLabels("sgd"), ALL["digits-mlp-sgd"]()
    batches = [(noisy.batch(0, step, 0), clean.batch(0, step, 0)) for step in range(50)]
    assert all(torch.equal(a[0], b[0]) for a, b in batches)
    changed = torch.stack([(a[1] != b[1]).float().mean() for a, b in batches]).mean()
    # 0.3 of them drawn, nine of ten drawn ones another: 0.27, +- 4 standard errors over 3,200 labels.
    assert float(changed) == pytest.approx(0.27, abs=0.032)


def test_images_turn_half_way():
    shift, plain = kinds.Shift("adamw"), ALL["digits-mlp-adamw"]()
    before, after = (problem_batch[0] for problem_batch in (shift.batch(0, 599, 0), shift.batch(0, 600, 0)))
    assert torch.equal(before, plain.batch(0, 599, 0)[0])
    assert torch.equal(after.view(-1, 8, 8).mT, plain.batch(0, 600, 0)[0].view(-1, 8, 8))
    assert len(shift.validation[0]) == len(plain.validation[0])


def test_dropout_drops_as_many_as_it_says_and_none_in_evaluation():
    problem = kinds.Dropout("adamw")
    parameters = [parameter.unsqueeze(0) for parameter in problem.init(0)]
    batch = [column.unsqueeze(0) for column in problem.batch(0, 0, 0)]

    def loss(samples, rate: float) -> float:
        return float(problem.losses(parameters, samples, {"dropout": torch.tensor([rate])}).mean())

    assert loss(batch, 0.0) == loss(batch[:2], 0.5)
    assert loss(batch, 0.5) != loss(batch, 0.0)
    dropped = (batch[2] < 0.5).float().mean()
    assert float(dropped) == pytest.approx(0.5, abs=0.045)  # 4 standard errors over 2,048 masks
