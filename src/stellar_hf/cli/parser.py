# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The parser of the commands' arguments: dataclasses as flags, every wrong one refused in a sentence."""

import copy
import dataclasses
import difflib
import inspect
from argparse import ArgumentDefaultsHelpFormatter, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, get_type_hints

from transformers import HfArgumentParser, TrainingArguments

from .. import DEMO_MODEL

_NOT_GIVEN = object()
_OF_THE_TRAINER = "flags of the Trainer of Transformers"


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows each flag by one name, defaults where there is one, and the description as it is written."""

    def _get_help_string(self, action):
        if action.default in (DEMO_MODEL, [DEMO_MODEL]):  # whose path says nothing
            return f"{action.help} (default: the packaged demo model)"
        if any(name.startswith("--no_") for name in action.option_strings):
            return f"The opposite of --{action.dest}."
        return action.help if action.default in (None, []) else super()._get_help_string(action)

    def _format_action_invocation(self, action):
        shown = copy.copy(action)
        shown.option_strings = [name for name in action.option_strings if "-" not in name.lstrip("-")]
        return super()._format_action_invocation(shown)


class CommandParser(HfArgumentParser):
    """
    Flags for the fields of dataclasses, with their names in full.

    `--help` shows the flags of this package first, and those that the `Trainer` of Transformers brings along after
    them, under a heading of their own.

    Args:
        dataclass_types: Arguments of a command; those of a training last.
        description: What `--help` shows above the flags.
        usage: What follows the command's name in the first line of `--help`.
    """

    def __init__(self, *dataclass_types: type, description: str | None, usage: str = "[--FLAG VALUE ...]"):
        self.parsed_types = dataclass_types
        groups: list[Any] = [group for dataclass_type in dataclass_types for group in _groups(dataclass_type)]
        super().__init__(
            groups,
            description=description,
            usage=f"%(prog)s {usage}",
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raises the error instead of printing it under a usage of all flags."""
        raise ValueError(f"{message[:1].upper()}{message[1:]}.")

    @property
    def defaults(self) -> dict[str, Any]:
        """The values of all flags where none is given."""
        return vars(self.parse_known_args([])[0])

    def given(self, argv: Sequence[str]) -> dict[str, Any]:
        """
        The values that the arguments give, without any defaults.

        Raises:
            ValueError: On an unknown flag, with the name that it resembles, or an impossible value.
        """
        names = self.defaults
        namespace, unknown = self.parse_known_args(argv, Namespace(**dict.fromkeys(names, _NOT_GIVEN)))
        if unknown:
            raise ValueError(_describe_unknown(unknown[0], names))
        return {name: value for name, value in vars(namespace).items() if value is not _NOT_GIVEN}

    def parse(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """
        The dataclasses, made of the arguments and the parser's defaults.

        Raises:
            ValueError: On an unknown flag, with the name that it resembles, or an impossible value.
        """
        values = {**self.defaults, **self.given(argv)}
        return tuple(
            dataclass_type(
                **{field.name: values[field.name] for field in dataclasses.fields(dataclass_type) if field.init}
            )
            for dataclass_type in self.parsed_types
        )


def _groups(dataclass_type: type) -> Iterator[type]:
    """A dataclass for each group of flags in `--help`: what a training's arguments only inherit is one of its own."""
    if not issubclass(dataclass_type, TrainingArguments):
        yield dataclass_type
        return
    own = {name for base in dataclass_type.__mro__ for name in _own_annotations(base)}
    hints = get_type_hints(dataclass_type)
    fields = [field for field in dataclasses.fields(dataclass_type) if field.init]
    for title, is_own in (("training", True), (_OF_THE_TRAINER, False)):
        shown = [_copy(field, hints[field.name]) for field in fields if (field.name in own) == is_own]
        yield dataclasses.make_dataclass(title, shown, namespace={"_argument_group_name": title}, kw_only=True)


def _own_annotations(base: type) -> dict[str, Any]:
    is_ours = issubclass(base, TrainingArguments) and base is not TrainingArguments
    return inspect.get_annotations(base) if is_ours else {}


def _copy(field: dataclasses.Field, hint: Any) -> tuple[str, Any, Any]:
    # A copy, since the parser writes the type into it.
    copy: Any = dataclasses.field(
        default=field.default, default_factory=field.default_factory, metadata=field.metadata
    )
    return field.name, hint, copy


def _describe_unknown(argument: str, names: dict[str, Any]) -> str:
    if not argument.startswith("-"):
        return f"The argument {argument!r} does not belong to any flag: write --FLAG VALUE."
    flag = argument.split("=")[0]
    close = difflib.get_close_matches(flag.replace("-", "_"), [f"__{name}" for name in names], n=1)
    return f"{flag} does not exist: " + (f"did you mean --{close[0][2:]}?" if close else "--help lists all flags.")
