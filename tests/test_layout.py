# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Imports go in the directions that CONTRIBUTING.md allows."""

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "src" / "stellar_hf"
ALL_ROOMS = "all of them"


def read_layout() -> dict[str, set[str] | str]:
    """The rooms that each room of the table may import, by the names that `room_of` gives."""
    layout = {}
    for line in (REPOSITORY / "CONTRIBUTING.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[0].startswith("`"):
            allowed = ALL_ROOMS if cells[2] == ALL_ROOMS else set(re.findall(r"`([^`]+)`", cells[2]))
            layout[cells[0].strip("`")] = allowed
    return layout


def room_of(module: str) -> str | None:
    """Room of a module whose name is given from the package on, such as `data.views`; None for the package itself."""
    first = module.split(".")[0]
    if not first:
        return None
    if (PACKAGE / first).is_dir():
        return f"{first}/"
    return "*_stellar.py" if first.endswith("_stellar") else f"{first}.py"


def is_for_types_only(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported_modules(file: Path) -> set[str]:
    """Modules of the package that a file imports at any place, but for types alone."""
    folder = file.relative_to(PACKAGE).parts[:-1]
    found = set()
    waiting: list[ast.AST] = [ast.parse(file.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and is_for_types_only(node):
            waiting += node.orelse
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            base = folder[: len(folder) - node.level + 1]
            found |= {".".join((*base, *(node.module or alias.name).split("."))) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("stellar_hf"):
            found.add(node.module.removeprefix("stellar_hf").lstrip("."))
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("stellar_hf").lstrip(".")
                for alias in node.names
                if alias.name.split(".")[0] == "stellar_hf"
            }
        waiting += ast.iter_child_nodes(node)
    return found


LAYOUT = read_layout()
FILES = sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_file_imports_only_what_its_room_may(file):
    room = room_of(".".join(file.relative_to(PACKAGE).with_suffix("").parts))
    assert room in LAYOUT, f"CONTRIBUTING.md has no row for {room}"
    if LAYOUT[room] == ALL_ROOMS:
        return
    rooms = {module: room_of(module) for module in imported_modules(file)}
    wrong = [module or "stellar_hf" for module, other in rooms.items() if other != room and other not in LAYOUT[room]]
    assert not wrong, f"{room} may import {sorted(LAYOUT[room])}, but {file.name} imports {wrong}"


def test_every_row_of_the_table_is_there():
    for room in LAYOUT:
        assert list(PACKAGE.glob(room.rstrip("/"))), f"CONTRIBUTING.md names {room}, which does not exist"


@pytest.mark.parametrize("file", sorted((REPOSITORY / "examples").glob("*.py")), ids=lambda file: file.name)
def test_no_example_imports_another(file):
    examples = {other.stem for other in file.parent.glob("*.py")}
    imports = re.findall(r"^\s*(?:from|import) +([\w.]+)", file.read_text(), re.MULTILINE)
    assert not examples & set(imports)
