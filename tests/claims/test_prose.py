"""What README and docs promise a reader: short sentences, links that lead somewhere, commands that
exist."""

from __future__ import annotations

import importlib.util
import re
import runpy
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/*.md", "tests/*.md", "bench/**/*.md")
    for path in ROOT.glob(pattern)
)
README_LINES, SENTENCE_WORDS = 125, 35

FENCED = re.compile(r"^```.*?^```", re.M | re.S)
LINK = re.compile(r"!?\[([^\]]*)\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.*)$", re.M)
LIST_ITEM = re.compile(r"^ *(?:[-*]|\d+\.) ", re.M)
SENTENCE_END = re.compile(r"(?<=[.!?:]) +(?=[\W_]*[A-Z]|`)|(?<=[.!?]\)) +(?=[A-Z])")


def names(path):
    return str(path.relative_to(ROOT))


def sentences(text):
    """Those of paragraphs and list items: not of headings, tables, code and comments."""
    text = re.sub(r"<!--.*?-->", "", FENCED.sub("", text), flags=re.S)
    lines = ("" if line.startswith(("#", "|", "    ")) else line for line in text.splitlines())
    text = LIST_ITEM.sub("\n", LINK.sub(r"\1", "\n".join(lines)))
    for paragraph in re.split(r"\n\s*\n", text):
        yield from SENTENCE_END.split(" ".join(paragraph.split()))


def anchors(text):
    """As GitHub makes them from headings."""
    for heading in HEADING.findall(FENCED.sub("", text)):
        plain = LINK.sub(r"\1", heading).lower()
        yield re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def commands(text):
    """Lines of code blocks, fenced or indented, and code within sentences."""
    for block in FENCED.findall(text):
        yield from block.splitlines()[1:-1]
    rest = FENCED.sub("", text)
    yield from (line.strip() for line in rest.splitlines() if line.startswith("    "))
    yield from re.findall(r"`([^`\n]+)`", rest)


@pytest.mark.parametrize("path", PAGES, ids=names)
def test_sentences_are_short(path):
    long = [s for s in sentences(path.read_text()) if len(s.split()) > SENTENCE_WORDS]
    assert not long


@pytest.mark.parametrize("path", PAGES, ids=names)
def test_links_lead_somewhere(path):
    for _, target in LINK.findall(FENCED.sub("", path.read_text())):
        if re.match(r"https?:|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        found = (path.parent / name).resolve() if name else path
        assert found.exists(), target
        assert not anchor or anchor in set(anchors(found.read_text())), target


@pytest.mark.parametrize("path", PAGES, ids=names)
def test_headings_are_unique(path):
    found = list(anchors(path.read_text()))
    if path.name != "CHANGELOG.md":  # every version has the same ones
        assert len(set(found)) == len(found)


@pytest.mark.parametrize("path", PAGES, ids=names)
def test_commands_exist(path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for line in commands(path.read_text()):
        for target in re.findall(r"(?:^|&& |\$ )make ([a-z-]+)", line):
            assert target in targets, line
        for module in re.findall(r"python3? -m ((?:bench|express_vllm)[\w.]*)", line):
            assert importlib.util.find_spec(module), line
        for script in re.findall(r"(?<![\w/.-])((?:deploy|examples|tests)/[\w./-]+\w)", line):
            assert (ROOT / script).exists(), line
        for command in re.findall(r"express-vllm ([a-z]+)(?= |$)", line):
            assert command in ("doctor", "check", "conflicts"), line


def files_of_first_table(page):
    _, _, table = (ROOT / "docs" / page).read_text().partition("| --- |")
    return re.findall(r"`([\w/]+(?:\.py|/))`", table.split("\n\n")[0])


def test_the_architecture_names_every_module_that_exists():
    found = set(files_of_first_table("architecture.md"))
    folders = ("express_vllm", "backend", "scheduler")
    files = {path for name in folders for path in (ROOT / name).glob("*.py")}
    files = {str(path.relative_to(ROOT)) for path in files if path.name != "__init__.py"}
    assert {name for name in found if name.endswith(".py")} == files
    assert all((ROOT / name).exists() for name in found)


def test_the_page_of_kernels_names_every_file():
    files = {path.name for path in (ROOT / "backend" / "kernels").glob("*.py")}
    assert set(files_of_first_table("kernels.md")) == files - {"__init__.py", "reference.py"}


def test_the_readme_is_read_in_two_minutes():
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


def test_the_issue_form_asks_for_the_doctors_report():
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "fault.yml").read_text())
    first = form["body"][0]
    assert (
        "express-vllm doctor" in first["attributes"]["label"] and first["validations"]["required"]
    )


@pytest.mark.parametrize("repository", ["https://example.org/project", None])
def test_the_packages_description_has_no_link_to_a_file_beside_it(repository):
    """It is shown where the repository's files are not."""
    text = runpy.run_path(str(ROOT / "setup.py"))["description"](repository)
    found = [target for _, target in LINK.findall(text) if "arxiv" not in target]
    inside = re.compile(f"{re.escape(str(repository))}/(?:blob|raw)/main/([^#]*)")
    matches = [inside.match(target) for target in found]
    assert all(matches) and (len(found) > 10 if repository else not found)
    assert [match[1] for match in matches if not (ROOT / match[1]).exists()] == []
