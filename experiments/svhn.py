"""Distil a ResNet-34 into a ResNet-18 on SVHN (cropped).

    python -m experiments.svhn --metric=jw2

The paper's pair. 73,257 images to train and 26,032 to test, downloaded by tensorflow-datasets if
they are not on disk.
"""

from .common.cli import main
from .runs.settings import Distillation, Networks, Settings, Training

DEFAULTS = Settings(
    distillation=Distillation(metric="cw2", coef="1e-4"),
    networks=Networks(teacher="resnet34", student="resnet18"),
    training=Training(protocol="kd2m"),
)


def run(settings: Settings) -> None:
    """Train, evaluate and report."""
    from .runs.train import train_and_report  # loads JAX, which --help need not

    train_and_report(settings, "svhn")


if __name__ == "__main__":
    main(DEFAULTS, run, module="experiments.svhn", description=__doc__)
