"""What happens to inputs inside the program, as the caller wrote it."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import jax

# (x, keys) -> x, or (x, labels, keys) -> (x, labels); keys is None in evaluation.
Preprocess: TypeAlias = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Prepare:
    """A caller's function in one form: ``(x, labels, keys) -> (x, labels)``.

    Attributes:
      function: the caller's.
      changes_labels: whether it takes and returns labels, too. Then inputs without labels (None)
        are not its business.
    """

    function: Preprocess
    changes_labels: bool

    @classmethod
    def of(cls, function: Preprocess | None) -> "Prepare":
        """Look at how many arguments a function has; None leaves everything as it is."""
        if function is None:
            return cls(_unchanged, False)
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):  # a built-in function tells nothing
            parameters = ()
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        given = [p for p in parameters if p.kind in positional]
        needed = [p for p in given if p.default is p.empty]
        named = len(given) == 3 and given[1].name == "labels"
        return cls(function, len(needed) == 3 or named)

    def __call__(self, x: Any, labels: Any, keys: jax.Array | None) -> tuple[Any, Any]:
        """Return inputs and labels as the network and the loss take them."""
        if not self.changes_labels:
            return self.function(x, keys), labels
        if labels is None:
            return x, labels
        found = self.function(x, labels, keys)
        if not isinstance(found, tuple) or len(found) != 2:
            raise TypeError("a preprocess of (x, labels, keys) must return (x, labels)")
        return found


def _unchanged(x, keys):
    return x
