"""How metrics and their options are written in a name: "jw2:beta=0.5+kd@logits"."""

import ast
import math
import re
from typing import Any

from kd2m_jax.losses._checks import shown


def spelled(name: str) -> str:
    """Return a metric's name as METRICS has it, term by term, with its options as they are."""
    parts = (term.strip().partition(":") for term in terms(name))
    return "+".join(n.replace("_", "-").lower() + colon + rest for n, colon, rest in parts)


def terms(name: str) -> list[str]:
    """Return the terms of a sum; the plus sign of a number as in 1e+16 is no sum's."""
    return re.split(r"(?<![\d.][eE])\+", name)


_WORDS = {"true": True, "false": False, "inf": math.inf}


def option_of(text: str) -> tuple[str, Any]:
    """Return the name and value in "beta=0.5", "solver=ipot", "debiased=true" or "stages=1,2"."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"an option of a metric is written name=value, got {shown(repr(text))}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # a word, or no end of signs
        return name, _WORDS.get(value.lower(), value)


def as_written(value: Any) -> str:
    """Return an option's value as `option_of` reads it back; a number without a plus sign."""
    if isinstance(value, tuple):
        return ",".join(map(as_written, value)) + ("," if len(value) == 1 else "")
    return repr(value).replace("e+", "e") if isinstance(value, float) else str(value)
