"""The table of one regime, from its JSON: differences in pairs, intervals, Holm. No JAX."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import optimize, stats

from ...common import tables
from .. import intervals
from .study import FIXED, FIXED_RATE, LABEL_FREE

POWER = 0.8
# What a row is also held against: of a sum its first part, of a rotation the distance without, and
# what leaves out the teacher's axes against what does not.
REFERENCES = {
    "kd+cw2": ("kd",),
    "kd+procrustes": ("kd",),
    "cw2:rotation=true": ("cw2", "l2"),
    "gaussian-cw2:rotation=true": ("gaussian-cw2",),
    "procrustes": ("l2",),
    "gram": ("l2",),
    "cka": ("l2",),
}


def chosen(found: dict[str, Any]) -> str:
    """Return the lambda or learning rate that is best in validation, the smallest of equals."""
    known = {name: score[0] for name, score in found["tried"].items() if score and name != "none"}
    known = {k: v for k, v in known.items() if not k.startswith("auto")}
    by_size = sorted(known, key=float)
    return max(by_size, key=known.__getitem__) if known else next(iter(found["tried"]))


def summarised(content: dict[str, Any]) -> dict[str, Any]:
    """Compute what a regime's table shows.

    Returns:
      ``{"seeds", "rows", "detectable"}``. By row: ``accuracy`` (`intervals.summary`, of the chosen
      lambda), ``lambdas`` (the chosen ones, a seed each), ``difference`` to the first row
      (`intervals.compare`), ``others``: differences at what nobody chose, by its name; and
      ``against``, the difference to another row of REFERENCES.
    """
    rows = content["rows"]
    seeds = sorted(set.intersection(*({*map(int, found)} for found in rows.values())))
    picked = {row: [chosen(found[str(seed)]) for seed in seeds] for row, found in rows.items()}
    scores = {
        row: [_test(found[str(s)], name) for s, name in zip(seeds, picked[row], strict=True)]
        for row, found in rows.items()
    }
    first = next(iter(rows))
    others = [row for row in rows if row != first]
    differences = intervals.compare({row: scores[row] for row in others}, scores[first])
    with_lambda = [row for row in others if picked[row] != ["none"] * len(seeds)]
    unchosen = {
        name: intervals.compare(
            {row: [_test(rows[row][str(s)], name) for s in seeds] for row in with_lambda},
            scores[first],
        )
        for name in _unchosen(content)
    }
    table = {
        row: {
            "values": scores[row],
            "accuracy": intervals.summary(scores[row]),
            "lambdas": picked[row],
            "difference": differences.get(row),
            "others": {name: found.get(row) for name, found in unchosen.items()},
            "against": {
                other: intervals.paired(scores[row], scores[other])
                for other in REFERENCES.get(row, ())
                if other in scores
            },
        }
        for row in rows
    }  # fmt: skip
    spreads = [d["sd"] for d in differences.values() if d["sd"] is not None]
    return {
        "seeds": len(seeds),
        "rows": table,
        "detectable": {
            "one row": _detectable(spreads, len(seeds), 1),
            "after Holm": _detectable(spreads, len(seeds), len(others)),
        },
    }


def _unchosen(content: dict[str, Any]) -> list[str]:
    """Return what is shown beside the chosen lambda: the fixed one, and the automatic ones.

    Nothing where each row was tried at one lambda alone: then none was chosen.
    """
    every = [one["tried"] for row in content["rows"].values() for one in row.values()]
    tried = {name for one in every if len(one) > 1 for name in one}
    fixed = [str(FIXED_RATE)] if content["about"]["regime"].startswith("shift") else [str(FIXED)]
    return [
        name
        for name in (*fixed, *sorted(n for n in tried if n.startswith("auto")))
        if name in tried
    ]


def _test(found: dict[str, Any], name: str) -> float | None:
    score = found["tried"].get(name)
    return None if score is None else score[1]


def _detectable(spreads: Sequence[float], n: int, rows: int) -> float | None:
    """Return the difference that n seeds find four times in five, at the median spread."""
    if not spreads or n < 2:
        return None
    critical = stats.t.ppf(1 - (1 - intervals.LEVEL) / (2 * rows), n - 1)
    # t of a true difference is noncentral: the shift at which it is beyond the critical value.
    missed = lambda shift: stats.nct.sf(critical, n - 1, shift) - POWER  # noqa: E731
    shift: Any = optimize.brentq(missed, 0, 10 * critical)
    return float(shift * np.median(spreads) / math.sqrt(n))


def rows_of_text(content: dict[str, Any]) -> list[list[str]]:
    """Write the table as text, a header first."""
    found = summarised(content)
    rate = content["about"]["regime"].startswith("shift")
    unchosen = list(next(iter(found["rows"].values()))["others"])
    symbol = "learning rate" if rate else "λ"
    # Of a row that has a lambda or a rate.
    chooses = any(set(one["lambdas"]) != {"none"} for one in found["rows"].values())
    header = [
        "",
        *[symbol] * chooses,
        "accuracy (%)",
        "gain",
        "95% interval",
        "p (Holm)",
    ]
    lines = [header + [f"{symbol} = {float(u):g}" if u[0] != "a" else u for u in unchosen]]
    for row, one in found["rows"].items():
        accuracy, d = one["accuracy"], one["difference"]
        spread = f" ± {accuracy['sd']:.1f}" if accuracy["sd"] is not None else ""
        mean = "diverged" if accuracy["mean"] is None else f"{accuracy['mean']:.1f}{spread}"
        cells = [row, *[_range(one["lambdas"])] * chooses, mean]
        cells += ["", "", ""] if d is None else [
            signed(d["mean"]), interval_text(d["interval"]), intervals.p_text(d["p_holm"]),
        ]  # fmt: skip
        cells += [
            "" if other is None else signed(other["mean"]) for other in one["others"].values()
        ]
        lines.append(cells)
    return lines


def _range(lambdas: Sequence[str]) -> str:
    values = sorted(float(name) for name in lambdas if name != "none")
    if not values:
        return ""
    return f"{values[0]:g}" if values[0] == values[-1] else f"{values[0]:g} to {values[-1]:g}"


def signed(mean: float | None) -> str:
    """Write a difference in points with its sign."""
    return "unknown" if mean is None else f"{mean:+.1f}"


def interval_text(interval: Sequence[float] | None) -> str:
    """Write a 95% interval with its signs."""
    return f"[{interval[0]:+.1f}, {interval[1]:+.1f}]" if interval else "unknown"


def note(content: dict[str, Any]) -> str:
    """Say in one paragraph how the table was made and what it could have found."""
    about, found = content["about"], summarised(content)
    cpu = sum(one["cpu_seconds"] for row in content["rows"].values() for one in row.values())
    spent = f"{cpu / 60:.0f} CPU minutes" if cpu < 3600 else f"{cpu / 3600:.1f} CPU hours"
    detectable = found["detectable"]
    sure = "" if detectable["one row"] is None else (
        f" At the median standard deviation of the rows a test has 80% power for a difference of "
        f"{detectable['one row']:.1f} points, and for one of {detectable['after Holm']:.1f} after "
        "the correction."
    )  # fmt: skip
    env = content["environment"]
    machines = dict.fromkeys(_machine(one) for one in (env, *content.get("also", [])))
    drawn = "student" if about["regime"] in ("full", LABEL_FREE) else "student and images"
    return (
        f"{found['seeds']} seeds of {drawn}; mean ± standard deviation of test accuracy; gains are "
        "over the first row, paired by seed, with 95% t-intervals; p is corrected for "
        f"{len(found['rows']) - 1} rows (Holm).{sure} Teacher: {about['teacher_accuracy']}%. "
        f"{spent} on {' and '.join(machines)}; {', '.join(content['dates'])}."
    )


def _machine(environment: dict[str, Any]) -> str:
    card = f" with one {environment['accelerator']}" if "accelerator" in environment else ""
    return f"{environment['cpu']}, {environment['cores']} cores{card}"


def text(content: dict[str, Any]) -> str:
    """Return the table and its note for a terminal."""
    about = content["about"]
    lines = rows_of_text(content)
    return f"{about['dataset']}, {about['regime']}\n{tables.aligned(lines)}\n\n{note(content)}"
