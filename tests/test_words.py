"""The words that this project no longer uses, and what to say in their place.

A reader knows the field's words and none of ours. What is searched: docstrings, comments and strings of prose in the
package and in ``launch/``, and every document. An identifier is not prose.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# pattern -> what to say
GONE = {
    r"by heart|memoriz\w*|memoris\w*": "overfits, overfitting",
    r"yardsticks?": "overfitting detector, or its threshold by name",
    r"races?|raced|racing": "learning-rate trial",
    r"contestants?": "trial groups",
    r"captains?": "group leaders",
    r"gone back from|went back from|goes back from": "rolled back",
    r"(?:last )?good states?": "rollback snapshot",
    r"(?:kept|set|put|moved) aside": "saved, or moved to the file by name",
    r"torn": "incomplete, inconsistent",
    r"str(?:ikes?|iking|uck)": "non-finite count; of tests: fault, fault injection",
    r"finite votes?|votes? (?:on|about) (?:finite|losses|gradients)": "non-finite mask",
    r"pulses?": "heartbeat",
    r"meeting points?": "synchronization point",
    r"meetings?(?! points?)|roster": "rendezvous, quorum, generation (torchelastic's words)",
    r"stands? down|stood down": "gives up the lease, exits, or what it really does",
    r"epochs? of (?:the )?members|members?' epochs?|clan's epochs?": "generation",
    r"spreads? group|group that spreads|spread groups": "group across members",
    r"spread of (?:the )?genes?|genes?' spread|spreads? of 0": "perturbation",
    r"(?:the|its|one|each|every|this|whole|a) column's?(?! of (?:a|the|this) table)|columns of ranks": (
        "replica group, peers"
    ),
    r"the seed (?:describes|says|has it)|the seed's (?:letter|plain|form)": "the original clan-training proposal",
    r"fared|foretold|foretells?": "did, predicted",
    r"such an?": "name the thing, or say `this`",
    r"as it stands": "leave it out",
    r"that comes": "name what it is: returned, next, given",
    r"whose use no \w+": "turn the sentence round: no ... shows its use",
    r"(?:rates?|file|report) alone": "only",
}
# (file, pattern) -> why it may stay
ALLOWED: dict[tuple[str, str], str] = {}

DOCUMENTS = sorted(
    [ROOT / "README.md", *(ROOT / "clantune_scale").rglob("*.md"), *(ROOT / ".github").rglob("*.md")],
    key=str,
)
SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), ROOT / ".ci" / "run", *(ROOT / "configs").glob("*.json")])
SOURCES = sorted([*(ROOT / "clantune_scale").rglob("*.py"), *(ROOT / "launch").glob("*.py")])


def _prose_of_source(text: str) -> Iterator[tuple[int, str]]:
    """Docstrings, comments and strings with a blank in them, by their first line; what is code in a docstring, not."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            yield node.lineno, _without_code(node.value)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], _without_code(token.string)


def _without_code(text: str) -> str:
    """The text with blanks in place of what stands in backticks: names may be older than these rules."""
    return re.sub(r"```.*?```|``[^`]*``|`[^`\n]*`", lambda code: re.sub(r"[^\n]", " ", code[0]), text, flags=re.DOTALL)


@cache
def _prose() -> tuple[tuple[str, int, str], ...]:
    """(file, line, text) of everything that is searched."""
    found = []
    for path in [*SOURCES, *DOCUMENTS, *SCRIPTS]:
        text, name = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))
        blocks = _prose_of_source(text) if path.suffix == ".py" else [(1, _without_code(text))]
        found += [(name, line, block) for line, block in blocks]
    return tuple(found)


def _places(pattern: str, prose: tuple[tuple[str, int, str], ...]) -> list[str]:
    places = []
    # A phrase may be broken over two lines.
    regex = re.compile(rf"\b(?:{pattern.replace(' ', chr(92) + 's+')})\b", re.IGNORECASE)
    for name, line, block in prose:
        if (name, pattern) in ALLOWED:
            continue
        for hit in regex.finditer(block):
            around = " ".join(block[max(0, hit.start() - 40) : hit.end() + 40].split())
            places.append(f"{name}:{line + block.count(chr(10), 0, hit.start())}: ...{around}...")
    return sorted(set(places))


@pytest.mark.parametrize("pattern", GONE)
def test_a_word_that_is_gone_does_not_come_back(pattern):
    places = _places(pattern, _prose())
    assert not places, f"{len(places)} times /{pattern}/. Say: {GONE[pattern]}\n" + "\n".join(places)


def test_what_is_allowed_is_still_there():
    searched = {name for name, _, _ in _prose()}
    for (name, pattern), reason in ALLOWED.items():
        assert reason and pattern in GONE and name in searched, f"{name} needs no exception for /{pattern}/ any more"


def test_what_counts_as_prose():
    source = '''"""Races with ``race_at``."""\nrace = "race"  # by\nsay(f"a race {race}")\n'''
    prose = tuple(("x.py", line, text) for line, text in _prose_of_source(source))
    assert [place.partition(": ")[0] for place in _places(r"races?", prose)] == ["x.py:1", "x.py:3"]
    assert len(_places("by heart", (("x.md", 1, "learnt by\nheart"),))) == 1
