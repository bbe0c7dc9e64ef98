"""What a process hands over to its next life."""

from __future__ import annotations

from clantune_scale.distributed.elastic.generation import VARIABLE, Generation

LAUNCH = {"RANK": "3", "WORLD_SIZE": "6", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


def test_the_first_remembers_what_the_launcher_set():
    generation = Generation.read({**LAUNCH, "TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert generation.number == 0 and generation.launch == {
        **LAUNCH,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": None,
    }


def test_the_next_finds_the_launchers_variables_again():
    first = Generation.read(LAUNCH)
    environ = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "node1",
        "MASTER_PORT": "4242",
        "TORCHELASTIC_RUN_ID": "x",
    }
    Generation(
        1, (0, 2), (("node0", 1), ("node2", 2)), first.launch, "abc", "/run", "gone", 1.5, 1, "round-000003"
    ).write(environ)
    kept = environ.pop(VARIABLE)
    assert environ == LAUNCH
    again = Generation.read({VARIABLE: kept})
    assert again.members == (0, 2) and again.addresses == (("node0", 1), ("node2", 2))
    assert (again.number, again.run_dir, again.failure, again.num_idle) == (1, "/run", "gone", 1)
    assert again.launch == first.launch and again.newest == "round-000003"
