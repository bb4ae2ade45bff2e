"""What is studied on each data set: sizes, networks, steps, and the lambdas that are tried."""

import dataclasses
from typing import Any

Coefs = tuple[float | str, ...]

# Lambdas of every row: FIXED, for those without validation labels, is one of them.
LAMBDAS, FIXED = (0.01, 0.1, 1.0, 10.0, 100.0), 1.0
# Where the best is at an end, the grid goes on by tens, no further than this.
WIDEST = (1e-4, 1e4)
# And what needs none: lambda from the gradients' norms, at two ratios.
AUTO = ("auto:0.1", "auto:1")
# Learning rates of the adaptation to a shifted domain, likewise.
RATES, FIXED_RATE = (3e-4, 1e-3, 3e-3), 1e-3
RATE = 1e-3  # of everything else
# Curves over lambda: their grid, the rows that are drawn, and the regimes.
CURVE_ROWS, CURVES = ("none", "l2", "cw2", "kd", "procrustes"), ("transfer", "noise")
CURVE = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
# Whom does the plan pair? The rows that are looked into, and of how many test images.
PAIRS_ROWS, PAIRED = ("w2", "gaussian-w2", "cw2"), 1000
NOISE = 0.4
CONFIDENT = 0.9

# Regimes with labels, without any, and the shifted domains.
LABELLED = ("few", "transfer", "noise", "full")
LABEL_FREE = "label-free"
SHIFTS = ("rotation", "noise", "translation", "blur", "rotation-unequal", "noise-unequal")
REGIMES = (*LABELLED, LABEL_FREE, "shift", "curve", "pairs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """One data set's sizes.

    Attributes:
      student: widths of the student's hidden layers; the last is the number of features.
      filters: of the teacher's convolutions, each of stride 2.
      teacher_epochs: how long it is trained.
      steps: of each student.
      noise_steps: of each student with wrong labels: enough for it to fit them.
      full_steps: of each student that has all labels.
      adaptation_steps: of each student that is adapted.
      batch: labelled images per step, or fewer where there are fewer.
      batch_beside: the same where the distance sees other images, too.
      transfer_batch: images of the transfer set per step.
      adaptation_batch: shifted images per step.
      held: training images that no teacher and no student is trained on, for validation.
      labels: per regime, the numbers of labels to train on and to choose lambda by.
      shifted_labels: labelled images of the shifted domain, to choose the learning rate by.
      coarse: an MLP sees images averaged over squares of so many pixels.
      student_filters: convolutions of the student, with BatchNorm, before a last hidden layer; of
        none it is an MLP.
      coefs: the rows that are trained, each at one lambda; none: all rows, at all lambdas.
      shifts: the domains.
      rates: the learning rates of the adaptation.
      methods: the ways to adapt; none: all that suit the student.
    """

    student: tuple[int, ...]
    filters: tuple[int, ...]
    teacher_epochs: int
    steps: int
    noise_steps: int
    full_steps: int
    adaptation_steps: int
    batch: int = 128
    batch_beside: int = 32
    transfer_batch: int = 128
    adaptation_batch: int = 256
    held: int
    labels: dict[str, tuple[int, int]]
    shifted_labels: int = 200
    coarse: int = 1
    student_filters: tuple[int, ...] = ()
    coefs: dict[str, float] = dataclasses.field(default_factory=dict)
    shifts: tuple[str, ...] = SHIFTS
    rates: tuple[float, ...] = RATES
    methods: tuple[str, ...] = ()


STUDIES = {
    "digits": Study(
        student=(32, 32),
        filters=(16, 32),
        teacher_epochs=60,
        steps=400,
        noise_steps=400,
        full_steps=400,
        adaptation_steps=300,
        adaptation_batch=128,
        held=247,
        labels={"few": (80, 20), "transfer": (40, 40), "noise": (400, 100), "full": (1100, 247)},
        shifted_labels=100,
    ),
    "mnist": Study(
        student=(64, 64),
        filters=(16, 32, 64),
        teacher_epochs=6,
        steps=500,
        noise_steps=1000,
        full_steps=1500,
        adaptation_steps=500,
        held=10_000,
        labels={
            "few": (800, 200),
            "transfer": (100, 100),
            "noise": (4000, 1000),
            "full": (50_000, 5000),
        },
    ),
    "cifar10": Study(
        student=(256, 64),
        coarse=2,
        filters=(32, 64, 128),
        teacher_epochs=12,
        steps=500,
        noise_steps=1000,
        full_steps=1500,
        adaptation_steps=500,
        held=10_000,
        labels={
            "few": (800, 200),
            "transfer": (800, 200),
            "noise": (4000, 1000),
            "full": (40_000, 5000),
        },
    ),
    # A step takes long here: one lambda per row, fixed before any was trained.
    "cifar10-conv": Study(
        student=(64,),
        student_filters=(16, 32, 64),
        filters=(32, 64, 128),
        teacher_epochs=12,
        steps=500,
        noise_steps=1000,
        full_steps=1000,
        adaptation_steps=300,
        held=10_000,
        labels={"transfer": (800, 200)},
        coefs={"none": 0.0, "l2": 1.0, "cw2": 1.0, "kd": 10.0, "procrustes": 1.0},
        shifts=("rotation", "noise"),
        rates=(FIXED_RATE,),
        methods=(
            "nothing",
            "BatchNorm statistics",
            "information maximisation",
            "w2",
            "gaussian-cw2, statistics, balanced",
        ),
    ),
}


def regimes_of(study: Study) -> tuple[str, ...]:
    """Return the regimes that a study has the sizes for."""
    one_lambda = ("curve", "pairs") if study.coefs else ()
    return tuple(r for r in REGIMES if (r in study.labels or r not in LABELLED) and
                 r not in one_lambda)  # fmt: skip


def about(dataset: str, regime: str, study: Study, teacher: float) -> dict[str, Any]:
    """Describe what decides a regime's numbers: a file of other ones is not continued.

    Sizes at their defaults are left out, so that a new one leaves old files what they are.
    """
    defaults = {one.name: one.default for one in dataclasses.fields(study)}
    constants: dict[str, Any] = {"rate": RATE}
    if regime.startswith("shift"):
        constants |= {"confident": CONFIDENT}
    elif regime.startswith("curve"):
        constants |= {"lambdas": CURVE, "auto": AUTO}
    elif regime == "pairs":
        constants |= {"lambda": FIXED, "images": PAIRED}
    elif regime in LABELLED and not study.coefs:
        constants |= {"lambdas": LAMBDAS, "widest": WIDEST, "auto": AUTO}
    if regime.endswith("noise"):
        constants |= {"noise": NOISE}
    return {
        "dataset": dataset,
        "regime": regime,
        "study": {k: v for k, v in dataclasses.asdict(study).items() if v != defaults[k]},
        "constants": constants,
        "teacher_accuracy": teacher,
    }


# What --smoke trains.
SMOKE_COEFS, SMOKE_ROWS = (1.0, "auto:1"), ("none", "l2", "cw2", "gaussian-cw2", "kd+cw2")
SMOKE_METHODS = ("nothing", "information maximisation", "w2", "gaussian-cw2, statistics, balanced")


def smoked(study: Study) -> Study:
    """Return the study cut to what a minute allows: it shows that everything runs, no more."""
    return dataclasses.replace(
        study,
        teacher_epochs=1,
        steps=4,
        noise_steps=4,
        full_steps=4,
        adaptation_steps=2,
        batch=32,
        transfer_batch=32,
        adaptation_batch=32,
    )
