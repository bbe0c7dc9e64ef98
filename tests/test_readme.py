"""The READMEs say what the code says, briefly, and lead where they say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from clantune_scale.config.deepspeed_file import extract
from clantune_scale.config.reference_table import gene_table, reference_table

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "clantune_scale"
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIGURATION = (PACKAGE / "config" / "README.md").read_text(encoding="utf-8")
READMES = [ROOT / "README.md", *sorted(PACKAGE.rglob("README.md"))]
PAGES = [*READMES, *sorted((ROOT / ".github").glob("*.md")), PACKAGE / "bench" / "schedules" / "LOG.md"]

MOST_WORDS = 1500
MOST_WORDS_OF_A_PARAGRAPH = 60
FIRST_SCREEN_LINES = 40


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _paragraphs(text: str) -> list[str]:
    """Paragraphs and list items; neither code, nor tables, nor headings."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^( {4,}\S|\||#).*$", "", text, flags=re.MULTILINE)
    return [block for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text) if block.strip()]


def _anchors(text: str) -> set[str]:
    """What GitHub makes of the headings."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_the_front_page_is_short():
    assert len(README.split()) <= MOST_WORDS


@pytest.mark.parametrize("path", READMES, ids=_name)
def test_no_paragraph_is_long(path):
    long = [p for p in _paragraphs(path.read_text(encoding="utf-8")) if len(p.split()) > MOST_WORDS_OF_A_PARAGRAPH]
    assert not long, "split into shorter paragraphs:\n" + "\n".join(f"{len(p.split())} words: {p}" for p in long)


def test_what_a_paragraph_is():
    text = "# Title of it\n\none two\nthree\n- four five\n- six\n\n| a | b |\n```\ncode\n```\n    more code\nseven"
    assert [p.split() for p in _paragraphs(text)] == [
        ["one", "two", "three"],
        ["-", "four", "five"],
        ["-", "six"],
        ["seven"],
    ]


def test_the_first_screen_answers_what_a_stranger_asks():
    screen = "\n".join(README.splitlines()[:FIRST_SCREEN_LINES])
    asked = {
        "a table with a tuned baseline": "tuned by hand",
        "compute": "**Compute:**",
        "memory": "**Memory:**",
        "communication": "**Communication:**",
        "installing it": "pip install",
        "use": "clantune_scale.initialize(",
        "what was run": "**Run:**",
        "what was not run": "**Not run:**",
        "who should not use it": "**Do not use it**",
    }
    missing = [what for what, text in asked.items() if text not in screen]
    assert not missing, f"the first {FIRST_SCREEN_LINES} lines of README.md do not say: {', '.join(missing)}"


def test_both_commands_are_on_the_front_page():
    for command in ("launch/quickstart.sh", "launch/test.sh"):
        assert re.search(rf"^{command}\b", README, re.MULTILINE), command


def test_the_workflow_calls_both_commands_and_the_hooks_fetch_nothing():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert "launch/test.sh" in workflow and "launch/quickstart.sh" in workflow
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert re.findall(r"repo: *(\S+)", hooks) == ["local"]
    assert set(re.findall(r"entry: \.venv/bin/(\w+)", hooks)) == {"ruff", "mypy"}


def test_every_extra_that_is_named_can_be_installed():
    # Read as text: Python 3.10 has no TOML parser.
    block = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = block.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = set(re.findall(r"^([\w-]+) *=", block, re.MULTILINE))
    for path in READMES:
        text = path.read_text(encoding="utf-8")
        named = set(re.findall(r"`\[([a-z]+)\]`", text)) | set(re.findall(r"pip install[^\n`]*\[([a-z]+)\]", text))
        assert named <= extras, f"{_name(path)} names extras that pyproject.toml lacks: {sorted(named - extras)}"


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        file, _, anchor = target.partition("#")
        place = (path.parent / file).resolve() if file else path
        assert place.exists(), f"{_name(path)} links to {target}, which is not there"
        if anchor:
            assert anchor in _anchors(place.read_text(encoding="utf-8")), f"{target} has no such heading"


def test_every_folder_readme_can_be_reached_from_the_front_page():
    linked = {(ROOT / target.partition("#")[0]).resolve() for target in re.findall(r"\]\(([^)\s]+)\)", README)}
    assert set(READMES[1:]) <= linked


@pytest.mark.parametrize("table", [reference_table(), gene_table()], ids=["keys", "genes"])
def test_tables_are_those_of_the_models(table):
    assert table in CONFIGURATION, (
        "print the tables with `python -m clantune_scale.config.reference_table` and paste them into config/README.md"
    )


def test_the_block_that_is_shown_is_valid():
    (block,) = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    assert extract(json.loads(block))[1].population_size == 4


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_what_is_named_exists(path):
    text = path.read_text(encoding="utf-8")
    named = re.findall(r"`((?:launch|configs|tests|clantune_scale)/[\w./]*)`", text)
    named += re.findall(r"\b((?:launch|configs)/\w[\w./]*\.(?:py|sh|json))\b", text)
    gone = sorted({name for name in named if not (ROOT / name).exists()})
    assert not gone, f"{_name(path)} names files that are not there: {gone}"


@pytest.mark.parametrize("path", READMES, ids=_name)
def test_modules_that_are_run_exist(path):
    for module in re.findall(r"python -m (clantune_scale[\w.]*)", path.read_text(encoding="utf-8")):
        place = ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), module
