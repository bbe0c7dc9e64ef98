from __future__ import annotations

import math
from dataclasses import replace

import pytest

from clantune_scale.core.genome import Gene
from clantune_scale.core.strategies.clan.centre import moved
from tests.core.strategies.facts import LR, WEIGHT_DECAY

STILL = {"lr": 0.0, "weight_decay": 0.0}


@pytest.mark.parametrize(
    ("changes", "decay"),
    [({"lr": 0.5}, -0.5), ({"lr": -0.5}, 0.5), ({"weight_decay": -0.3}, -0.3), ({"weight_decay": 0.3}, 0.0)],
    ids=["rate rises", "rate falls", "less decay", "more decay"],
)
def test_weight_decay_keeps_its_product_with_the_rate_and_believes_its_own_vote_downward_alone(changes, decay):
    after = moved(STILL, changes, (LR, WEIGHT_DECAY))
    assert after == {"lr": changes.get("lr", 0.0), "weight_decay": decay}


def test_it_follows_the_rate_of_its_own_parameter_groups():
    head, body = replace(LR, name="lr:head", groups=("head",)), replace(LR, name="lr:body", groups=("body",))
    decay = replace(WEIGHT_DECAY, groups=("head",))
    centre = dict.fromkeys(("lr:head", "lr:body", "weight_decay"), 0.0)
    assert moved(centre, {"lr:body": 1.0}, (head, body, decay))["weight_decay"] == 0.0
    assert moved(centre, {"lr:head": 1.0}, (head, body, decay))["weight_decay"] == -1.0


def test_all_stay_inside_their_bounds():
    tight = replace(WEIGHT_DECAY, bounds=(0.5, 2.0))
    after = moved(STILL, {"lr": 100.0}, (LR, tight))
    assert after == {"lr": LR.encode(LR.bounds[1]), "weight_decay": pytest.approx(math.log(0.5))}


def test_a_decay_that_is_not_a_factor_is_left_to_its_own_vote():
    linear = Gene("weight_decay", scale="linear", bounds=(0.0, 1.0), initial=0.1)
    centre = {"lr": 0.0, "weight_decay": 0.1}
    assert moved(centre, {"lr": 1.0, "weight_decay": 0.05}, (LR, linear))["weight_decay"] == pytest.approx(0.15)
