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
        needed = [p for p in parameters if p.kind in positional and p.default is p.empty]
        return cls(function, len(needed) == 3)

    def __call__(self, x: Any, labels: Any, keys: jax.Array | None) -> tuple[Any, Any]:
        """Return inputs and labels as the network and the loss take them."""
        if not self.changes_labels:
            return self.function(x, keys), labels
        return (x, labels) if labels is None else self.function(x, labels, keys)


def _unchanged(x, keys):
    return x
