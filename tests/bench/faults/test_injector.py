"""Faults are injected at their points."""

from __future__ import annotations

import importlib

import pytest

from clantune_scale.bench.faults import injector
from clantune_scale.bench.faults.actions import InjectedError
from clantune_scale.bench.faults.injector import POINTS, Fault, install, to_environ
from clantune_scale.distributed.elastic.generation import Generation
from clantune_scale.errors import ConfigError


@pytest.mark.parametrize("point", POINTS)
def test_points_are_functions_of_the_package(point):
    module, path = POINTS[point]
    found = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    assert callable(found)


@pytest.fixture
def gathering(monkeypatch):
    """A point's function, put back afterwards."""
    module = importlib.import_module("clantune_scale.runtime.members")
    clan = importlib.import_module("clantune_scale.runtime.clan").Clan
    calls = []
    monkeypatch.setattr(module, "gather_diagnostics", lambda: calls.append(1))
    monkeypatch.setattr(clan, "__init__", clan.__init__)
    return module, calls


def test_a_fault_is_injected_once_before_or_after(gathering):
    module, calls = gathering
    environ = {"RANK": "1", **to_environ([Fault(1, "diagnostics", action="raise"), Fault(0, "diagnostics:after")])}
    assert install(environ) == [Fault(1, "diagnostics", action="raise")]
    with pytest.raises(InjectedError):
        module.gather_diagnostics()
    assert calls == []
    module.gather_diagnostics()
    assert calls == [1]


def test_after(gathering):
    module, calls = gathering
    install({"RANK": "0", **to_environ([Fault(0, "diagnostics:after", action="raise")])})
    with pytest.raises(InjectedError):
        module.gather_diagnostics()
    assert calls == [1]


def test_another_generation_is_not_touched(gathering):
    environ = to_environ([Fault(1, "diagnostics", generation=1)])
    assert install({"RANK": "1", **environ}) == []
    later = {"RANK": "1", **environ}
    Generation(1, launch={}).write(later)
    assert install(later) == [Fault(1, "diagnostics", generation=1)]


def test_a_step_is_waited_for(gathering, monkeypatch):
    module, calls = gathering

    class Clan:
        class phases:
            class position:
                step = 4

    monkeypatch.setattr(injector, "_clans", lambda: [Clan])
    install({"RANK": "0", **to_environ([Fault(0, "diagnostics", 5, "raise")])})
    module.gather_diagnostics()
    Clan.phases.position.step = 5
    with pytest.raises(InjectedError):
        module.gather_diagnostics()
    assert calls == [1]


def test_what_there_is_not_is_refused():
    with pytest.raises(ConfigError, match="no fault 'kill' at 'lunch'.*'forward'"):
        Fault(0, "lunch")
    with pytest.raises(ConfigError, match="no fault 'hug' at 'step'"):
        Fault(0, "step", action="hug")
