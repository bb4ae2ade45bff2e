"""What is wrong with a command line, in one sentence, before it is read."""

import dataclasses
import difflib
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import tyro


class Flag(NamedTuple):
    """One flag of a dataclass of flags.

    Attributes:
      kind: the type of its value, or of each of its values; None: it has no meaning there.
      choices: its only values; empty: any.
      many: whether it takes several values.
      may_be_none: whether "None" is a value.
      is_positional: whether its values stand without its name.
    """

    kind: Any
    choices: tuple[Any, ...] = ()
    many: bool = False
    may_be_none: bool = False
    is_positional: bool = False


def flags_of(kind: Any) -> Iterator[tuple[str, Flag]]:
    """Give the flags that a dataclass of dataclasses makes, by their names."""
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint, marks = hints[field.name], ()
        while get_origin(hint) is Annotated:
            hint, *more = get_args(hint)
            marks += tuple(more)
        if tyro.conf.Fixed in marks:
            continue
        if dataclasses.is_dataclass(hint):
            yield from flags_of(hint)
        elif tyro.conf.Suppress in marks:
            yield field.name.replace("_", "-"), Flag(None)
        else:
            yield field.name.replace("_", "-"), _flag(hint, tyro.conf.Positional in marks)


def _flag(hint: Any, is_positional: bool) -> Flag:
    may_be_none = many = False
    if get_origin(hint) in (Union, types.UnionType):
        hint, *others = [one for one in get_args(hint) if one is not type(None)]
        may_be_none = not others
    if get_origin(hint) is tuple:
        hint, many = get_args(hint)[0], True
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    return Flag(hint, choices, many, may_be_none, is_positional)


def mistake(arguments: Sequence[str], defaults: Any) -> str | None:
    """Return what is wrong with the first flag that is, None where nothing is seen."""
    flags = dict(flags_of(type(defaults)))
    takes_more = any(flag.is_positional for flag in flags.values())
    given, i = set(), 0
    while i < len(arguments):
        argument, i = arguments[i], i + 1
        if argument in ("-h", "--help"):
            return None
        if argument == "--" or not argument.startswith("-"):
            if takes_more:
                continue
            return f"{argument!r} is no flag: flags begin with --{_nearest(argument, flags, '--')}"
        name, equals, value = argument.partition("=")
        name = name.lstrip("-").replace("_", "-")
        if name not in flags or not argument.startswith("--"):
            return f"there is no flag {argument.partition('=')[0]}{_nearest(name, flags, '--')}"
        flag = flags[name]
        if flag.kind is None:
            return f"--{name} has no meaning here"
        given.add(name)
        values = [value] if equals else []
        if flag.kind is not bool and not equals:
            while i < len(arguments) and not arguments[i].startswith("--"):
                values.append(arguments[i])
                i += 1
                if not flag.many:
                    break
        if wrong := _wrong(name, flag, values):
            return wrong
    missing = [name for name, flag in flags.items() if name not in given and _needed(defaults, name)
               and not flag.is_positional]  # fmt: skip
    return f"--{missing[0]} is needed; --help says what it is" if missing else None


def _needed(defaults: Any, name: str) -> bool:
    return getattr(defaults, name.replace("-", "_"), None) is tyro.MISSING


def _wrong(name: str, flag: Flag, values: Sequence[str]) -> str | None:
    """Return what is wrong with the values of one flag."""
    if flag.kind is bool:
        return f"--{name} takes no value, got {values[0]!r}" if values else None
    if not values and not flag.many:  # of several values none is for the main to refuse
        one_of = f": one of {', '.join(map(str, flag.choices))}" if flag.choices else ""
        return f"--{name} needs a value{one_of}"
    for value in values:
        if flag.may_be_none and value == "None":
            continue
        if flag.choices and value not in map(str, flag.choices):
            hint = _nearest(value, flag.choices) or f": one of {', '.join(map(str, flag.choices))}"
            return f"--{name} cannot be {value!r}{hint}"
        if flag.kind in (int, float):
            try:
                flag.kind(value)
            except ValueError:
                what = "a whole number" if flag.kind is int else "a number"
                return f"--{name} must be {what}, got {value!r}"
    return None


def _nearest(word: str, known: Iterable[Any], before: str = "") -> str:
    near = difflib.get_close_matches(word, [str(one) for one in known], 2)
    return f": did you mean {' or '.join(before + one for one in near)}?" if near else ""
