# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Pages for people: links lead somewhere, the site shows every page, and the reference every public name."""

import ast
import re
import unicodedata
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "src" / "stellar_hf"
DOCS = REPOSITORY / "docs"
PAGES = sorted(
    [*REPOSITORY.glob("*.md"), *DOCS.rglob("*.md"), *(REPOSITORY / "benchmarks").glob("*.md")],
)


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"(?ms)^ *```.*?^ *```$", "", text))


def links(page: Path) -> list[str]:
    """Targets of the links and images of a page that lead to files of the repository."""
    text = without_code(page.read_text())
    targets = re.findall(r"\]\(<?([^)\s>]+)", text) + re.findall(r"(?m)^\[[^\]]+\]: (\S+)", text)
    targets += re.findall(r'(?:src|href)="([^"]+)"', text)
    return [target for target in targets if not re.match(r"\w+:", target)]


def anchors(page: Path) -> set[str]:
    """What `#…` may say of the headings of a page, where GitHub and the site agree."""
    text = re.sub(r"(?ms)^ *```.*?^ *```$", "", page.read_text())
    found = set()
    for heading in re.findall(r"(?m)^#+ (.+)$", text):
        plain = re.sub(r"[`*]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)).strip().lower()
        on_github = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        ascii_only = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
        on_the_site = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_only).strip())
        if on_github == on_the_site:
            found.add(on_github)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page):
    for link in links(page):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name} links to {link}, which does not exist"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {link}: no heading of {target.name} has that name"
        if page.is_relative_to(DOCS):
            assert target.is_relative_to(DOCS), f"{page.name} links to {link}, which is not on the site"


def names_of_pages(node) -> set[str]:
    if isinstance(node, str):
        return {node}
    return set().union(*map(names_of_pages, node.values() if isinstance(node, dict) else node))


def test_the_site_shows_every_page():
    shown = names_of_pages(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"])
    assert shown == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}


def exported(module: Path) -> set[str]:
    nodes = ast.walk(ast.parse((module / "__init__.pyi").read_text()))
    return {node.name for node in nodes if isinstance(node, ast.alias)}


@pytest.mark.parametrize("module", sorted(file.parent for file in PACKAGE.rglob("__init__.pyi")), ids=lambda m: m.name)
def test_the_reference_shows_every_public_name(module):
    pages = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    shown = {path.rpartition(".")[2] for path in re.findall(r"(?m)^::: ([\w.]+)$", pages)}
    assert exported(module) <= shown, f"missing in docs/api: {sorted(exported(module) - shown)}"


def messages() -> str:
    """All texts of the package, with … for what is put in."""
    texts = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_the_messages_that_the_questions_quote_are_those_of_the_package():
    quotes = re.findall(r'(?m)^### "(.+)"$', (DOCS / "faq.md").read_text())
    said = messages()
    unknown = [quote for quote in quotes if not all(part.strip() in said for part in re.split("…", quote))]
    assert quotes and not unknown
