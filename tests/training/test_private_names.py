# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Private names of other libraries: that they are still there, and that all that are used are listed."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest
from accelerate import Accelerator
from torch import nn

import stellar_hf
from stellar_hf.training.private_names import PRIVATE_NAMES, forget_preparation

PACKAGE = Path(stellar_hf.__file__).parent
LISTED = {entry.name for entry in PRIVATE_NAMES}


def find(path):
    """A module, or a class of one, by its full name."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name != "_"


def is_set_on_objects(name, owner):
    """Whether the module of a class assigns an attribute of that name, or reads it of an object."""
    nodes = ast.walk(ast.parse(inspect.getsource(inspect.getmodule(owner))))
    return any(isinstance(node, ast.Attribute) and node.attr == name for node in nodes)


@pytest.mark.parametrize("entry", PRIVATE_NAMES, ids=lambda entry: entry.name)
def test_the_library_still_has_it(entry):
    owner = find(entry.owner)
    where = f"{entry.owner}.{entry.name}, which training/private_names.py lists ({entry.reason})"
    assert hasattr(owner, entry.name) or is_set_on_objects(entry.name, owner), f"{where} is gone."
    if entry.parameters is not None:
        found = inspect.signature(getattr(owner, entry.name)).parameters
        new = {
            name
            for name, parameter in found.items()
            if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        } - set(entry.parameters)
        fits = set(entry.parameters) <= found.keys() and not new
        assert fits, f"{where} takes {', '.join(found)} now, and not {', '.join(entry.parameters)}."


def test_all_that_are_used_are_listed():
    trees = {file: ast.parse(file.read_text()) for file in PACKAGE.rglob("*.py")}
    nodes = [(file, node) for file, tree in trees.items() for node in ast.walk(tree)]
    own = {node.name for _, node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.attr for _, node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    own |= {node.id for _, node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    used = {
        (file.relative_to(PACKAGE).as_posix(), node.attr)
        for file, node in nodes
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own
    }
    used |= {
        (file.relative_to(PACKAGE).as_posix(), alias.name)
        for file, node in nodes
        if isinstance(node, ast.ImportFrom) and node.level == 0
        for alias in node.names
        if any(is_private(part) for part in (*node.module.split("."), alias.name))
    }
    unlisted = [f"{name} in {file}" for file, name in sorted(used) if name not in LISTED]
    assert not unlisted, f"Private names of other libraries that training/private_names.py does not list: {unlisted}"


def test_all_that_are_overridden_are_listed():
    unlisted = []
    for file in PACKAGE.rglob("*.py"):
        classes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ClassDef)]
        if not classes or file.name == "__main__.py":
            continue
        module = importlib.import_module(".".join(("stellar_hf", *file.relative_to(PACKAGE).with_suffix("").parts)))
        for node in classes:
            bases = [
                base for base in getattr(module, node.name).__mro__ if not base.__module__.startswith("stellar_hf")
            ]
            defined = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
            stored = (item for item in ast.walk(node) if isinstance(getattr(item, "ctx", None), ast.Store))
            defined |= {item.attr if isinstance(item, ast.Attribute) else getattr(item, "id", "") for item in stored}
            unlisted += [
                f"{name} of {node.name}"
                for name in sorted(defined - LISTED)
                if is_private(name) and any(hasattr(base, name) for base in bases)
            ]
    assert not unlisted, f"Private names of base classes that training/private_names.py does not list: {unlisted}"


def test_a_model_that_an_evaluation_prepared_can_be_prepared_for_training():
    model = nn.Linear(1, 1)
    Accelerator(cpu=True).prepare_model(model, evaluation_mode=True)
    assert model._is_accelerate_prepared, "Accelerate marks prepared models in another way: see forget_preparation."
    forget_preparation(model)
    assert not hasattr(model, "_is_accelerate_prepared")
    forget_preparation(model)  # one that was never prepared
