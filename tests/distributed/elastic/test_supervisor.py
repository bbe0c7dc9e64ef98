"""What restarts a process, and what ends it."""

from __future__ import annotations

import sys

import pytest

from clantune_scale.config.schema import FaultsConfig
from clantune_scale.distributed.elastic import supervisor
from clantune_scale.distributed.elastic.generation import VARIABLE, Generation
from clantune_scale.distributed.elastic.supervisor import Supervisor
from clantune_scale.tracking.run_dir import ROUNDS

GONE = RuntimeError("[/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1")


class Again(BaseException):
    """Raised in place of a restart."""


@pytest.fixture
def again(monkeypatch):
    def start(environ):
        raise Again

    monkeypatch.setattr(supervisor, "restart_process", start)
    ended = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, traceback: ended.append(error))
    return ended


def supervised(run_dir=None, *, generation=None, min_members=2):
    environ = {"RANK": "0", "CLANTUNE_RESUME": "before"}
    made = Supervisor(
        FaultsConfig(min_members=min_members),
        generation or Generation(launch={"RANK": "5"}),
        members=(0, 1, 2, 3),
        name="rank 1 of member 2",
        environ=environ,
    )
    made.set_members((0, 2, 3))
    made.set_addresses((("node0", 1), ("node2", 2), ("node3", 3)))
    made.run_dir = run_dir
    return made, environ


def commit(run_dir, name):
    (run_dir / ROUNDS / name).mkdir(parents=True)


def fail(error):
    sys.excepthook(type(error), error, None)


def test_a_peers_failure_leads_to_the_next_generation(tmp_path, again, caplog):
    commit(tmp_path, "round-000003")
    _, environ = supervised(tmp_path)
    with pytest.raises(Again):
        fail(GONE)
    generation = Generation.read(environ)
    assert (generation.number, generation.members, generation.newest) == (1, (0, 2, 3), "round-000003")
    assert generation.addresses == (("node0", 1), ("node2", 2), ("node3", 3))
    assert environ["CLANTUNE_RESUME"] == str(tmp_path) and environ["RANK"] == "5" and again == []
    assert (
        "clan: rank 1 of member 2 leaves generation 0 for generation 1: rank 1 of member 2: RuntimeError:"
        in caplog.text
    )


def test_without_a_committed_round_it_begins_anew(tmp_path, again):
    _, environ = supervised(tmp_path)
    with pytest.raises(Again):
        fail(GONE)
    assert "CLANTUNE_RESUME" not in environ and Generation.read(environ).run_dir is None


def test_a_users_error_ends_the_process(tmp_path, again):
    made, environ = supervised(tmp_path)
    error = ValueError("of the user")
    fail(error)
    assert again == [error] and VARIABLE not in environ
    # What fails afterwards, on the way out, does not bring it back.
    fail(GONE)
    made._on_failure("a peer is silent")
    assert again == [error, GONE]


def test_where_members_may_not_die_the_end_says_how_the_run_goes_on(tmp_path, again, caplog):
    commit(tmp_path, "round-000003")
    _, environ = supervised(tmp_path, min_members=None)
    fail(GONE)
    assert again == [GONE] and VARIABLE not in environ
    assert f"a member is lost. Launch again with CLANTUNE_RESUME={tmp_path}" in caplog.text


def test_it_comes_before_hooks_that_were_set_since(tmp_path, again):
    made, _ = supervised(tmp_path)
    below, seen = sys.excepthook, []

    def hook(kind, error, traceback):
        seen.append(error)
        below(kind, error, traceback)

    sys.excepthook = hook
    made.precede_other_hooks()
    with pytest.raises(Again):
        fail(GONE)
    assert seen == []


def test_a_users_error_passes_all_hooks_once(tmp_path, again):
    made, _ = supervised(tmp_path)
    below, seen = sys.excepthook, []

    def hook(kind, error, traceback):
        seen.append(error)
        below(kind, error, traceback)

    sys.excepthook = hook
    made.precede_other_hooks()
    error = ValueError("of the user")
    fail(error)
    assert seen == [error] and again == [error]


def test_what_is_queued_is_sent_before(tmp_path, again):
    made, _ = supervised(tmp_path)
    sent = []
    made.before_restart.append(lambda: sent.append(1))
    with pytest.raises(Again):
        made._on_failure("rank 0 of member 3 sent no heartbeat for 1 s")
    assert sent == [1]


def test_generations_without_progress_are_the_last(tmp_path, again, monkeypatch, caplog):
    class Exit(BaseException):
        pass

    def leave(code):
        raise Exit(code)

    monkeypatch.setattr(supervisor.os, "_exit", leave)
    commit(tmp_path, "round-000003")
    generation = Generation(launch={"RANK": "5"})
    for number in range(1, 5):
        _, environ = supervised(tmp_path, generation=generation)
        with pytest.raises(Again):
            fail(GONE)
        generation = Generation.read(environ)
        assert (generation.number, generation.num_idle) == (number, number - 1)
    commit(tmp_path, "round-000004")
    _, environ = supervised(tmp_path, generation=generation)
    with pytest.raises(Again):
        fail(GONE)
    assert Generation.read(environ).num_idle == 0
    _, environ = supervised(tmp_path, generation=Generation(5, (0, 2, 3), launch={}, num_idle=3, newest="round-000004"))
    with pytest.raises(Exit, match="1"):
        fail(GONE)
    assert "4 generations in a row began with all members and failed" in caplog.text
