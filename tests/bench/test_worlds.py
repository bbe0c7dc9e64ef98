import pytest

from clantune_scale.bench import worlds
from clantune_scale.distributed.topology import Topology
from clantune_scale.errors import ClanError


@pytest.mark.parametrize("degrees", [{"dp": 1, "pp": 8, "tp": 8}, {"dp": 4, "pp": 8, "tp": 8}, {"dp": 3, "pp": 2}])
def test_every_sampled_rank_stands_where_the_order_of_ranks_says(degrees):
    layout = worlds.lay_out(Topology(64, **degrees), num_samples=9)
    assert layout.num_sampled == 9
    # A rank holds its own groups and not the whole clan's: some hundred kilobytes at 16,384 ranks.
    assert 0 < layout.megabytes_per_rank < 5


def test_a_wrong_group_is_found(monkeypatch):
    monkeypatch.setattr(Topology, "replica_group_ranks", lambda self, rank: list(range(self.population_size)))
    with pytest.raises(ClanError, match=r"rank \d+ of 4 members.* built .* and its definition is"):
        worlds.lay_out(Topology(4, dp=2, tp=2), num_samples=5)


def test_ranks_meet_on_one_store():
    assert worlds.arrive(24, timeout_s=30) < 30


def test_the_command_says_what_it_measured(capsys):
    worlds.main(["--population", "4", "--pp", "2", "--samples", "3", "--arrivals", "0"])
    assert "4 members x (dp 1 x pp 2 x tp 1) = 8 ranks: 3 sampled ranks passed" in capsys.readouterr().out
