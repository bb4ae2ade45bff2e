"""Compiled programs that calls of `fit` share: few, found by structure, and without arrays."""

import collections
import contextlib
import dataclasses
import functools
import inspect
import itertools
import sys
import types
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from kd2m_jax._compat import forget

# Each has a few megabytes of code in some tens of the 65,530 memory maps that Linux grants.
MOST = 32
_LIBRARIES = {"kd2m_jax", "experiments", "optax", "jax", "jaxlib", "flax", "functools", "builtins"}

_programs: collections.OrderedDict[Hashable, Callable] = collections.OrderedDict()
_numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_count = itertools.count()


class NotShared(Exception):
    """A part that only one call may use: it holds an array, or nothing tells it from others."""


def shared(make: Callable[..., Any], *parts: Any) -> Any:
    """Return ``make(*parts)``, or what an earlier call with parts of the same structure made.

    A caller's own functions are compared by identity and by all that they refer to. They are held
    weakly, and the program goes with them. Where a part holds an array the program is made for
    this call alone.
    """
    try:
        structure = _Structure()
        key = (make, structure.of(parts))
        hash(key)
        kept = [_weakly(part, key, structure.callers) for part in parts]
        if structure.callers:  # some lie where they cannot be held weakly
            raise NotShared
    except (NotShared, TypeError):
        return make(*parts)
    if key not in _programs:
        _programs[key] = make(*kept)
        while len(_programs) > MOST:
            _forget(next(iter(_programs)))
    _programs.move_to_end(key)
    return Shared(_programs[key], parts)


class Shared(NamedTuple):
    """A program, and the caller's functions, which it needs and does not hold itself."""

    program: Callable
    parts: tuple

    def __call__(self, *arguments: Any) -> Any:
        """Run the program."""
        return self.program(*arguments)


def drop_unshared(program: Any) -> None:
    """Let go of a program that was made for one call alone, after that call."""
    if not isinstance(program, Shared):
        forget(program)


def _forget(key: Hashable) -> None:
    if not sys.is_finalizing() and key in _programs:
        forget(_programs.pop(key))


def _weakly(part: Any, key: Hashable, callers: list) -> Any:
    """Return a part that does not hold the caller's functions in it, and cross these off."""
    again = functools.partial(_weakly, key=key, callers=callers)
    if any(part is c for c in callers):
        callers[:] = [c for c in callers if c is not part]
        reference = weakref.ref(part, lambda _: _forget(key))

        def held_weakly(*args, **options):
            return reference()(*args, **options)  # pyright: ignore

        with contextlib.suppress(TypeError, ValueError):  # what it takes decides what it gets
            held_weakly.__signature__ = inspect.signature(part)  # pyright: ignore
        return held_weakly
    if type(part) in (tuple, list):
        return type(part)(map(again, part))
    if isinstance(part, functools.partial):
        options = {name: again(value) for name, value in part.keywords.items()}
        return functools.partial(again(part.func), *map(again, part.args), **options)
    if dataclasses.is_dataclass(part) and _of_library(type(part), {"kd2m_jax"}):
        fields = {f.name: again(getattr(part, f.name)) for f in dataclasses.fields(part)}
        return type(part)(**fields)
    return part


class _Structure:
    """What tells parts from others, hashable, and without an array in it.

    Attributes:
      callers: the functions and callable objects that are not a library's.
    """

    def __init__(self):
        self.callers: list[Any] = []
        self._above: list[Any] = []
        self._in_caller = 0

    def of(self, part: Any) -> Hashable:
        """Return a part's structure; NotShared where it holds an array or is unknown."""
        for depth, one in enumerate(self._above):
            if one is part:
                return "above", depth
        self._above.append(part)
        found = self._of(part)
        self._above.pop()
        return found

    def _of(self, part: Any) -> Hashable:
        match part:
            case None | str() | bytes() | bool() | int() | float() | complex():
                return type(part), part
            case type():
                return self._of_class(part)
            case jax.Array() | np.ndarray() | np.generic():
                raise NotShared
            case tuple() | list() | set() | frozenset():
                return self._of_container(part, tuple(map(self.of, part)))
            case Mapping():
                return self._of_container(part, tuple((k, self.of(v)) for k, v in part.items()))
            case functools.partial():
                return "partial", self.of((part.func, part.args, part.keywords))
            case types.MethodType():
                return "method", self.of((part.__func__, part.__self__))
            case types.FunctionType():
                return self._of_function(part)
            case types.BuiltinFunctionType() | types.ModuleType():
                return type(part), part.__name__
        if dataclasses.is_dataclass(part):
            fields = [getattr(part, f.name, None) for f in dataclasses.fields(part)]
            return self.of(type(part)), self.of(fields)
        if hasattr(part, "__wrapped__"):  # jax.jit, jax.custom_vjp
            return type(part).__name__, self.of(part.__wrapped__)
        if _of_library(type(part)) or isinstance(part, np.dtype):  # they compare by value
            return part
        if callable(part):
            return self._of_caller(part, [type(part), *vars(part).items()])
        raise NotShared

    def _of_container(self, part: Any, contents: tuple) -> Hashable:
        # A list that a caller's function writes into is the same list afterwards.
        mutable = not isinstance(part, tuple | frozenset)
        return type(part).__name__, id(part) if self._in_caller and mutable else contents

    def _of_function(self, part: types.FunctionType) -> Hashable:
        cells = tuple(cell.cell_contents for cell in part.__closure__ or ())
        options = tuple((part.__kwdefaults__ or {}).items())
        refers = (cells, part.__defaults__, options)
        if _of_library(part):
            own = part.__closure__ is None  # made once, with its module
            return (part.__module__, part.__qualname__) if own else (part.__code__, self.of(refers))
        return self._of_caller(part, [*refers, *_globals(part).items()])

    def _of_class(self, part: type) -> Hashable:
        if _of_library(part):
            return part
        methods = [m for m in vars(part).values() if isinstance(m, types.FunctionType)]
        before = len(self.callers)
        found = _number(part), self.of((part.__bases__, *methods))
        del self.callers[before:]  # the class holds them, and programs may hold a class
        return found

    def _of_caller(self, part: Any, refers: Iterable) -> Hashable:
        before = len(self.callers)
        self._in_caller += 1
        found = _number(part), tuple(map(self.of, refers))
        self._in_caller -= 1
        self.callers[before:] = [part]  # it holds what it refers to
        return found


def _globals(function: types.FunctionType) -> dict[str, Any]:
    known = function.__globals__
    return {name: known[name] for name in function.__code__.co_names if name in known}


def _of_library(thing: Any, libraries: set[str] = _LIBRARIES) -> bool:
    return (getattr(thing, "__module__", None) or "").split(".")[0] in libraries


def _number(thing: Any) -> int:
    """Return the number of something that is compared by identity. None is given twice."""
    if thing not in _numbers:
        _numbers[thing] = next(_count)
    return _numbers[thing]
