"""Training steps on the CPU beside torch with POT: MLPs, and resnet20 to resnet8.

Times are CPU seconds of this process; ``taskset -c 0`` in front keeps both sides on one core.
"""

import itertools
import time
from collections.abc import Callable, Sequence

import numpy as np
import optax
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

from kd2m_jax import fit, from_nnx

from . import measure, step
from .gpu_torch import ResNet, emd

MLPS = ("mlp-512-256-128-128-128", "mlp-512-256-128")  # the paper's, for MNIST
RESNETS = ("resnet20", "resnet8")
DEPTHS = {"resnet20": (3, 3, 3), "resnet8": (1, 1, 1)}
WIDTHS = (16, 32, 64)
LAYOUTS = {"torch": torch.contiguous_format, "torch, channels_last": torch.channels_last}
METRIC, COEF = "w2", 1e-3


def torch_cpu(
    out: str,
    mlps: tuple[str, str] = MLPS,
    resnets: tuple[str, str] = RESNETS,
    batch: int = 128,
    steps: int = 40,
    repeats: int = 15,
) -> tuple[list[dict], list[str]]:
    """Return rows and notes: a step of ours and of torch's, and a step of `fit`."""
    del out  # no plot
    rows, notes = [], []
    for pair, shape in ((mlps, (28, 28, 1)), (resnets, (32, 32, 3))):
        rows += (timed := _steps(pair, shape, batch, repeats))
        ours = timed[0]["ms"]
        in_fit = _fit(pair, shape, batch, steps)
        columns = {"networks": timed[0]["networks"], "what": "kd2m_jax.fit", "batch": batch}
        rows.append(columns | {"ms": in_fit, "ratio": in_fit / ours})
        name = columns["networks"]
        notes.append(
            measure.verdict(f"{name}: a step of fit over its program's", in_fit / ours, 1.1)
        )
        for row in timed[1:]:
            target = {"torch": 1.5 if pair is mlps else 1.0}.get(row["what"], 0.8)
            title = f"{name}: {row['what']} over a step of fit"
            notes.append(measure.verdict(title, row["ms"] / in_fit, target, least=True))
    return rows, notes


def _steps(pair: tuple[str, str], shape, batch: int, repeats: int) -> list[dict]:
    """Time one step of ours and of torch's, in turn, with the teacher in the loop."""
    teacher, student, x, labels = step.setting((*pair, shape), batch)
    ours = step.once(*step.program(from_nnx(student), from_nnx(teacher), x, labels, METRIC))
    runs = {"kd2m_jax": ours}
    for name, layout in LAYOUTS.items():
        if name == "torch" or not pair[0].startswith("mlp"):
            runs[name] = torch_step(pair, np.asarray(x), np.asarray(labels), layout)
    columns = {"networks": f"{pair[0]} to {pair[1]}", "batch": batch}
    cases = [measure.Case(columns | {"what": name}, run) for name, run in runs.items()]
    return measure.ratios(measure.in_turn(cases, repeats, 120.0, time.process_time))


def _fit(pair: tuple[str, str], shape, batch: int, steps: int) -> float:
    """Return the median CPU milliseconds of a step in `fit`, over epochs after the first."""
    teacher, student = (step.build(name, shape, seed) for seed, name in enumerate(pair))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(steps * batch, *shape)).astype(np.float32)
    ends: list[float] = []
    fit(
        student,
        (x, np.arange(len(x)) % 10),
        teacher=teacher,
        metric=METRIC,
        coef=COEF,
        optimizer=optax.sgd(0.01, momentum=0.9),
        epochs=6,
        batch_size=batch,
        progress=False,
        callbacks=[lambda record: ends.append(time.process_time())],
    )
    # A record every 50 steps at least, and one at the end of each epoch.
    per_epoch = np.diff(ends[:: max(1, len(ends) // 6)])
    return 1e3 * float(np.median(per_epoch)) / steps


def network(name: str, shape: Sequence[int]) -> nn.Module:
    """Make torch's twin of one of our networks; it returns features and logits."""
    if name in DEPTHS:
        return ResNet(DEPTHS[name], WIDTHS)
    return MLP([int(np.prod(shape)), *map(int, name.split("-")[1:])])


class MLP(nn.Module):
    """`kd2m_jax.models.MLP`."""

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        layers = [
            layer
            for fan_in, fan_out in itertools.pairwise(widths)
            for layer in (nn.Linear(fan_in, fan_out), nn.ReLU())
        ]
        self.body, self.fc = nn.Sequential(nn.Flatten(), *layers), nn.Linear(widths[-1], 10)

    def forward(self, x):
        """Map ``[n, c, h, w]`` to features and ``[n, 10]``."""
        features = self.body(x)
        return features, self.fc(features)


def torch_step(pair: tuple[str, str], x: np.ndarray, labels: np.ndarray, layout) -> Callable:
    """Make a step as the paper's code has it, on images ``[n, h, w, c]``."""
    teacher, student = (network(name, x.shape[1:]).to(memory_format=layout) for name in pair)
    teacher.eval()
    optimizer = torch.optim.SGD(student.parameters(), 0.01, momentum=0.9)
    images = torch.tensor(x).permute(0, 3, 1, 2).contiguous(memory_format=layout)
    classes = torch.tensor(labels).long()

    def run():
        with torch.no_grad():
            seen_by_teacher, _ = teacher(images)
        features, logits = student(images)
        loss = nn.functional.cross_entropy(logits, classes) + COEF * emd(features, seen_by_teacher)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()

    return run
