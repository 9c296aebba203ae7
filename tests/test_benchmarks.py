# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The benchmarks run, print their tables and write them; what they measure on small sizes says nothing."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import find_benchmarks

REPOSITORY = Path(__file__).parents[1]
FOLDER = REPOSITORY / "benchmarks"


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """What all of them print, one after the other as a user runs them, and the folder of their tables."""
    folder = tmp_path_factory.mktemp("benchmarks")
    process = run("--quick", "--output_dir", str(folder))
    assert process.returncode == 0, process.stderr
    return process.stdout, folder


@pytest.mark.slow
@pytest.mark.parametrize("name", find_benchmarks())
def test_a_benchmark_prints_its_table_and_writes_it(quick_run, name):
    printed, folder = quick_run
    (section,) = [part for part in printed.split("\n## ") if part.startswith(f"{name}: ")]
    table = [line for line in section.splitlines() if line.startswith("| ")]
    with (folder / f"{name}.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    columns = [column.strip() for column in table[0].strip("|").split("|")]
    assert len(rows) == len(table) - 2 > 0
    assert list(rows[0])[: len(columns)] == columns
    assert all(row["model"] and row["device"] and row["torch"] and row["transformers"] for row in rows)
    assert "nan" not in section


@pytest.mark.slow
def test_an_unknown_name_is_refused_with_those_that_there_are():
    process = run("sped")
    assert process.returncode == 2
    assert "no benchmark sped" in process.stderr and "features" in process.stderr


def test_every_benchmark_has_its_line_in_the_readme():
    readme = (FOLDER / "README.md").read_text()
    named = [line.split("`")[1] for line in readme.splitlines() if line.startswith("| `")]
    assert sorted(named) == sorted(find_benchmarks())


@pytest.mark.parametrize("file", sorted(FOLDER.rglob("*.py")), ids=lambda file: str(file.relative_to(FOLDER)))
def test_no_file_is_longer_than_200_lines(file):
    assert len(file.read_text().splitlines()) <= 200
