"""Draw solvers.png and write solvers.json: exact transport beside Sinkhorn, epoch by epoch.

    python docs/results/solvers.py FOLDER ...

Each folder is that of an `experiments.table` whose metrics come in pairs, NAME[=LAMBDA] and
NAME:solver=sinkhorn[=LAMBDA].
"""

import pathlib
import sys

import numpy as np
import scipy.stats

from experiments.common import figures, files
from experiments.runs.folder import RunFolder

HERE = pathlib.Path(__file__).parent


def curves(cells: pathlib.Path) -> np.ndarray:
    """Return a cell's test accuracies in percent, ``[seeds, epochs]``."""
    found = [RunFolder(seed / cells.name).records for seed in sorted(cells.parent.parent.iterdir())]
    return np.array([[100 * line["test_accuracy"] for line in lines
                      if line["phase"] == "distilled" and "test_accuracy" in line]
                     for lines in found])  # fmt: skip


def main() -> None:
    """Compare every pair of every folder."""
    pairs = {}
    for folder in map(pathlib.Path, sys.argv[1:]):
        for dataset in (path for path in folder.iterdir() if path.is_dir()):
            for cell in sorted((dataset / "seed0").glob("*-solver=sinkhorn*")):
                exact = cell.with_name(cell.name.replace("-solver=sinkhorn", ""))
                name = exact.name.replace("=auto-", ", λ auto:")
                pairs[f"{dataset.name}: {name}"] = curves(exact), curves(cell)
    figure, axes = figures.subplots(
        -(-len(pairs) // 3), 3, figsize=(9, 2.3 * -(-len(pairs) // 3)), squeeze=False
    )
    table = {}
    for axis, (name, both) in zip(axes.flat, pairs.items(), strict=False):
        for curve, label, (colour, _) in zip(
            both, ("exact", "Sinkhorn"), figures.LINES, strict=False
        ):
            epochs = np.arange(1, curve.shape[1] + 1)
            axis.plot(epochs, curve.T, color=colour, linewidth=0.5, alpha=0.4)
            axis.plot(epochs, curve.mean(0), color=colour, linewidth=1.8, label=label)
        axis.set_ylim(
            min(np.percentile(c, 10) for c in both) - 0.5, max(c.max() for c in both) + 0.2
        )
        axis.set_title(name, fontsize=9)
        gap = both[0] - both[1]
        last = gap[:, -1]
        half = scipy.stats.t.ppf(0.975, len(last) - 1)
        table[name] = {
            "seeds": len(gap),
            "exact": both[0].mean(0).round(3).tolist(),
            "sinkhorn": both[1].mean(0).round(3).tolist(),
            "last, exact less sinkhorn": round(float(last.mean()), 3),
            "its 95% half-width": round(half * float(last.std(ddof=1)) / len(last) ** 0.5, 3),
            "all epochs, exact less sinkhorn": round(float(gap.mean()), 3),
        }
    axes[0][0].legend(frameon=False, fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("epoch")
    axes[0][0].set_ylabel("test accuracy (%)")
    figures.finish(figure, HERE / "solvers.png")
    files.write_json(HERE / "solvers.json", table)


if __name__ == "__main__":
    main()
