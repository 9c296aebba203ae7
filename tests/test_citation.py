# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Who is to be cited, and which version this is, are told alike in every place."""

from pathlib import Path

import pytest
import yaml

import stellar_hf
from stellar_hf import StellarModel
from stellar_hf.hub_stellar import write_model_card

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def citation():
    return yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())


def test_the_citation_file_has_what_its_format_requires(citation):
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    paper = citation["preferred-citation"]
    assert {"type", "title", "authors"} <= paper.keys() and {"name"} <= paper["conference"].keys()
    assert all({"family-names", "given-names"} == author.keys() for author in paper["authors"])


def test_the_version_is_cited_and_has_a_list_of_changes(citation):
    assert citation["version"] == stellar_hf.__version__
    assert f"\n## [{stellar_hf.__version__}]" in (REPOSITORY / "CHANGELOG.md").read_text()


def test_model_cards_cite_the_same_paper(citation, tiny_config, tmp_path):
    write_model_card(tmp_path, StellarModel(tiny_config()))
    bibtex = " ".join((tmp_path / "README.md").read_text().split("```bibtex")[1].split())
    paper = citation["preferred-citation"]
    names = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    assert f"{{{' and '.join(names)}}}" in bibtex
    assert f"{{{paper['title']}}}" in bibtex and paper["url"] in bibtex and f"{{{paper['year']}}}" in bibtex
