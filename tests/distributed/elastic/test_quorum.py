"""The rendezvous of a generation, with threads in place of processes."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from clantune_scale.distributed.elastic import quorum
from clantune_scale.distributed.elastic.generation import Generation
from clantune_scale.distributed.elastic.quorum import Quorum, Rendezvous
from clantune_scale.errors import MembersLostError
from tests.ranks import free_port


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(quorum, "_STAGGER_S", 0.5)
    monkeypatch.setattr(quorum, "_PAUSE_S", 0.02)
    monkeypatch.setattr(quorum, "_ANSWER_S", 2.0)


def generation(size, *, number=1, run_dir=None):
    return Generation(
        number,
        tuple(range(size)),
        tuple(("127.0.0.1", free_port()) for _ in range(size)),
        launch_id="launch",
        run_dir=run_dir,
        failure="rank 0 of member 1 was silent",
    )


def attend(ranks, began, *, member_size=1, min_members=1, rejoin_s=1.0):
    """What each (member, member rank, seconds late) got: its quorum, or the error's text."""

    def come(place):
        member, member_rank, late_s = place
        time.sleep(late_s)
        meets = Rendezvous(
            began,
            member=member,
            member_rank=member_rank,
            member_size=member_size,
            min_members=min_members,
            rejoin_s=rejoin_s,
        )
        try:
            stores.append(meets.attend())
            return stores[-1][1]
        except MembersLostError as error:
            return str(error)

    stores = []
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(come, ranks))


def test_all_come_and_nobody_waits_for_the_deadline():
    began = time.monotonic()
    found = attend([(0, 0, 0), (1, 0, 0), (2, 0, 0.2)], generation(3), rejoin_s=30)
    assert found == [Quorum((0, 1, 2))] * 3
    assert time.monotonic() - began < 10


def test_the_missing_one_is_left_out():
    found = attend([(0, 0, 0), (2, 0, 0)], generation(3))
    assert found == [Quorum((0, 2), {1: "none of its ranks came"})] * 2


def test_an_incomplete_member_is_left_out_and_its_ranks_are_told():
    found = attend([(0, 0, 0), (0, 1, 0), (1, 1, 0)], generation(2), member_size=2)
    assert found[:2] == [Quorum((0,), {1: "of its 2 ranks, 0 did not come"})] * 2
    assert found[2].startswith("generation 1 began without member 1: of its 2 ranks, 0 did not come. This rank ends")


def test_another_member_serves_where_the_first_is_dead():
    found = attend([(1, 0, 0), (2, 0, 0)], generation(3))
    assert found == [Quorum((1, 2), {0: "none of its ranks came"})] * 2


def test_who_comes_after_the_quorum_is_closed_is_told():
    found = attend([(0, 0, 0), (1, 0, 2.5)], generation(2), rejoin_s=1.0)
    assert found[0] == Quorum((0,), {1: "none of its ranks came"})
    assert found[1].startswith("generation 1 began without member 1: none of its ranks came")


def test_with_too_few_the_run_stops_and_says_how_it_goes_on(tmp_path):
    found = attend([(0, 0, 0), (2, 0, 0)], generation(3, run_dir=str(tmp_path)), min_members=3)
    assert found[0] == found[1]
    assert found[0].startswith(
        "2 members are left and clantune.faults.min_members is 3 (member 1: none of its ranks came; first failure: "
        "rank 0 of member 1 was silent). Launch again"
    )
    assert f"CLANTUNE_RESUME={tmp_path}" in found[0]


def test_of_two_halves_one_goes_on(tmp_path):
    """Servers that cannot see each other: addresses that only their own half knows."""
    whole = generation(4, run_dir=str(tmp_path))
    apart = Generation(1, whole.members, generation(4).addresses, launch_id="launch", run_dir=str(tmp_path), failure="")
    first = attend([(0, 0, 0), (1, 0, 0)], whole)
    second = attend([(2, 0, 0), (3, 0, 0)], apart)
    assert first == [Quorum((0, 1), {2: "none of its ranks came", 3: "none of its ranks came"})] * 2
    assert second[0] == second[1] and "generation 1 was begun by members [0, 1]" in second[0]
    assert "members [2, 3] cannot reach them" in second[0]
    # The next launch of the run has generations of its own.
    assert attend([(0, 0, 0)], Generation(1, (0,), generation(1).addresses, launch_id="other", run_dir=str(tmp_path)))[
        0
    ] == (Quorum((0,)))


def test_a_server_of_another_generation_is_not_taken():
    began = generation(1, number=7)
    held = []
    served = threading.Thread(
        target=lambda: held.append(
            Rendezvous(began, member=0, member_rank=0, member_size=1, min_members=1, rejoin_s=1).attend()
        )
    )
    served.start()
    served.join()
    assert quorum.probe(began.addresses[0], 7) is not None
    assert quorum.probe(began.addresses[0], 8) is None
    assert quorum.probe(("127.0.0.1", free_port()), 7) is None


def test_nobody_serves(monkeypatch):
    monkeypatch.setattr(quorum, "_MARGIN_S", 0.5)
    (found,) = attend([(0, 1, 0)], generation(1), member_size=2, rejoin_s=0.2)
    assert found.startswith("nobody serves the store of generation 1: members [0] were probed at ['127.0.0.1:")
