"""The README says what the code says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from clantune_scale.config.deepspeed_file import extract
from clantune_scale.config.reference_table import gene_table, reference_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("table", [reference_table(), gene_table()], ids=["keys", "genes"])
def test_tables_are_those_of_the_models(table):
    assert table in README, "print the tables with `python -m clantune_scale.config.reference_table` and paste them"


def test_the_block_that_is_shown_is_valid():
    (block,) = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    assert extract(json.loads(block))[1].population_size == 4


def test_what_is_named_exists():
    for name in re.findall(r"`((?:launch|configs)/[\w./]*)`", README):
        assert (ROOT / name).exists(), name
