"""Distil a deep MLP into a shallower one on MNIST.

    python -m experiments.mnist --metric=cw2

The paper's networks. 60,000 images to train and 10,000 to test, downloaded by tensorflow-datasets
if they are not on disk. The teacher has five hidden layers, the student three; both end in 128
features.
"""

from .common.cli import main
from .runs.settings import Distillation, Networks, Settings, Training

DEFAULTS = Settings(
    distillation=Distillation(metric="cw2", coef="1e-4"),
    networks=Networks(teacher="mlp-teacher", student="mlp-student"),
    training=Training(protocol="kd2m"),
)


def run(settings: Settings) -> None:
    """Train, evaluate and report."""
    from .runs.train import train_and_report  # loads JAX, which --help need not

    train_and_report(settings, "mnist")


if __name__ == "__main__":
    main(DEFAULTS, run, module="experiments.mnist", description=__doc__)
