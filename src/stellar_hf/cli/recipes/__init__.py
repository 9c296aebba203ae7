# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Recipes of pre-training: the packaged ones lie here, and files of a user are read alike."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

PACKAGED = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}


def read_recipe(name: str | Path, types: Mapping[str, Any]) -> dict[str, Any]:
    """
    Reads what a recipe and those that it builds on set.

    A recipe is a YAML or JSON file of names with values. Its `base` is another one: a path relative to it, or the name
    of a packaged one. Its values replace the base's, those of `model_config` one by one, and `null` takes one away.

    Args:
        name: File, or name of a packaged recipe.
        types: Types of the values, by their names.

    Returns:
        The values, of the types that are asked for.

    Raises:
        ValueError: If a file cannot be read, a name is unknown, a value has another type, or recipes build on each
            other in a circle. It names the file.
    """
    chain = _chain(_locate(str(name), Path()))
    merged: dict[str, Any] = {}
    for path, values in reversed(chain):
        config = {**(merged.get("model_config") or {}), **(values.get("model_config") or {})}
        merged |= {key: _checked(path, key, value, types) for key, value in values.items()}
        if config:
            merged["model_config"] = config
    return {key: value for key, value in merged.items() if value is not None}


def _chain(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """A recipe, the one that it builds on, and so on."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    while True:
        if path.resolve() in [other.resolve() for other, _ in chain]:
            raise ValueError(f"The recipe {chain[0][0]} builds on itself: {path} is its own base.")
        values = _read(path)
        base = values.pop("base", None)
        chain.append((path, values))
        if base is None:
            return chain
        if not isinstance(base, str):
            raise ValueError(f"The recipe {path} sets base to {base!r}, but it must be another recipe's path or name.")
        path = _locate(base, path.parent)


def _locate(name: str, folder: Path) -> Path:
    if Path(name).suffix in (".yaml", ".yml", ".json"):
        return folder / name
    if name not in PACKAGED:
        raise ValueError(f"There is no recipe {name}: give a .yaml or .json file, or one of {', '.join(PACKAGED)}.")
    return PACKAGED[name]


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())  # JSON is YAML
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"The recipe {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"The recipe {path} holds no 'name: value' pairs.")
    config = values.get("model_config")
    if config is not None and not isinstance(config, dict):
        raise ValueError(f"The recipe {path} sets model_config to {config!r}, but it must be names with values.")
    return values


# Types ---------------------------------------------------------------------------------------------------------------


def _checked(path: Path, key: Any, value: Any, types: Mapping[str, Any]) -> Any:
    if key not in types:
        raise ValueError(f"The recipe {path} sets {key}, which does not exist{_hint(key, types)}")
    if value is None:
        return None
    alternatives = _alternatives(types[key], is_text=isinstance(value, str))
    for alternative in alternatives:
        try:
            return _as(alternative, value)
        except (TypeError, ValueError):
            continue
    expected = " or ".join(dict.fromkeys(_describe(alternative) for alternative in alternatives))
    raise ValueError(f"The recipe {path} sets {key} to {value!r}, but it must be {expected}.")


def _hint(key: Any, types: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(str(key), types, n=1)
    return f": did you mean {close[0]}?" if close else "."


def _alternatives(hint: Any, is_text: bool) -> list[Any]:
    """The types that a value may have, in the order in which they are tried."""
    union = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    options = [option for option in union if option is not type(None)]
    if any(_choices(option) for option in options):  # of which only the names are allowed, not any text
        options = [option for option in options if option is not str]
    return sorted(options, key=lambda option: (option is str) != is_text)


def _as(kind: Any, value: Any) -> Any:
    """The value as one of a type; raises TypeError or ValueError if it is none."""
    if get_origin(kind) is list:
        (item,) = get_args(kind)
        return [_as(item, entry) for entry in (value if isinstance(value, list) else [value])]
    if kind in (int, float) and not isinstance(value, bool) and isinstance(value, int | float | str):
        if kind is int and isinstance(value, float) and not value.is_integer():
            raise ValueError
        return kind(value)  # also of text: YAML reads 2e-3 as such
    choices = _choices(kind)
    if choices and value is False and False not in choices:
        value = "no"  # as which YAML reads a bare no
    if choices and value not in choices:
        raise ValueError
    if not choices and (kind in (int, float) or not isinstance(value, get_origin(kind) or kind)):
        raise TypeError
    return value


def _choices(kind: Any) -> list[Any]:
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return [member.value for member in kind] if hasattr(kind, "__members__") else []  # of an enumeration


def _describe(kind: Any) -> str:
    if choices := _choices(kind):
        return f"one of {', '.join(map(str, choices))}"
    if get_origin(kind) is list:
        return f"a list, each {_describe(get_args(kind)[0])}"
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text", dict: "names with values"}
    return names.get(get_origin(kind) or kind, str(kind))
