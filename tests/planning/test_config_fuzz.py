"""Spoilt configs through ``clantune validate`` and ``plan``: sentences and the right exit code, never a traceback."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.planning.config_fuzz import mutants

# What DeepSpeed raises on only because this process is one rank.
_OF_ONE_RANK = re.compile(r"train_batch_size is not equal|has to be greater than 0|DeepSpeedConfig: .* is not defined")


def _sentence(text: str) -> bool:
    return text[-1] in ".?" and " " in text and "Traceback" not in text


def _check(call, number: int, seed: int, folder: Path) -> Counter[str]:
    from deepspeed.runtime.config import DeepSpeedConfig

    counts: Counter[str] = Counter()
    path = folder / "ds.json"
    for config, world_size, options in mutants(number, seed=seed):
        path.write_text(json.dumps(config))
        said = call("validate", path, "--world-size", world_size, *options, "--json")
        assert said.code in (0, 1), (config, said)
        data = said.data
        assert said.code == (1 if data["errors"] else 0) and data["valid"] is not bool(data["errors"]), config
        assert all(map(_sentence, data["errors"] + data["warnings"])), (config, data)
        counts["errors" if said.code else "valid"] += 1
        planned = call("plan", path, "--world-size", world_size, *options, "--params", "1e8")
        assert planned.code == (2 if data["errors"] else 0), (config, planned)
        assert not data["errors"] or _sentence(planned.err.strip()), planned.err
        try:
            DeepSpeedConfig(copy.deepcopy({key: value for key, value in config.items() if key != "clantune"}))
        except Exception as error:
            if not _OF_ONE_RANK.search(str(error)):
                counts["refused by DeepSpeed"] += 1
                assert data["errors"], (config, error)
    return counts


def test_sixty_spoilt_configs_get_sentences(call, tmp_path):
    counts = _check(call, 60, 1, tmp_path)
    assert counts["valid"] > 5 and counts["errors"] > 20 and counts["refused by DeepSpeed"] > 5


@pytest.mark.slow
def test_a_thousand_spoilt_configs_get_sentences(call, tmp_path):
    counts = _check(call, 1000, 2, tmp_path)
    print(dict(counts), file=sys.stderr)
    assert sum(counts.values()) > 1000
