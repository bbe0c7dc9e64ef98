from __future__ import annotations

import pytest

from clantune_scale.core.fitness import Fitness
from clantune_scale.core.strategies import Population, build
from clantune_scale.core.strategies.control import Control
from clantune_scale.errors import ConfigError
from tests.core.strategies.facts import FACTS


class Mine(Control):
    """A strategy of a user's own, without options."""

    Options = None

    def init(self, start: Fitness) -> Population:
        return Population((), {"mine": True})


def test_strategies_are_found_by_name_and_by_import_path():
    assert build("control", FACTS, {"fraction": 0.5}).options.fraction == 0.5
    assert type(build(f"{__name__}:Mine", FACTS)) is Mine


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("clann", {}, "there is no strategy 'clann'. Did you mean 'clan'?"),
        ("zzz", {}, "Choose from: clan, classic, control, halving, hdet, pbt"),
        ("clan", {"growht": 1}, "strategy 'clan' has no option 'growht'. Did you mean 'growth'?"),
        ("clan", {"growth": "much"}, "option clan.growth is 'much', a str. Give a float."),
        ("clan", {"growth": True}, "option clan.growth is True, a bool"),
        ("clan", {"decay": "cosine"}, "option clan.decay is 'cosine'. Choose from: 'linear', 'none'"),
        ("clan", {"freeze_at": 0}, "freeze_at is 0.0. It must be above 0 and at most 1"),
        ("classic", {"fraction": 0.7}, "fraction is 0.7. It must be above 0 and at most 0.5"),
        ("classic", {"tournament_size": 2.5}, "tournament_size is 2.5, a float. Give a int"),
        ("no_such_package:Thing", {}, "cannot be imported"),
        (f"{__name__}:Missing", {}, "has no attribute 'Missing'"),
        (f"{__name__}:FACTS", {}, "not a strategy"),
        (f"{__name__}:Mine", {"fraction": 0.1}, "takes no options, but was given"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_remedy(name, options, message):
    with pytest.raises(ConfigError) as error:
        build(name, FACTS, options)
    assert message in str(error.value)
