"""Distil a ResNet-34 into a ResNet-18 on CIFAR-10 or CIFAR-100.

    python -m experiments.cifar --metric=jw2
    python -m experiments.cifar --teacher=resnet20 --student=resnet8 --max-steps=30

The paper's pair. 50,000 images to train and 10,000 to test, downloaded by tensorflow-datasets if
they are not on disk. From scratch with the CIFAR stem by default, which is not the paper's
ImageNet-pretrained setting: that is --stem=imagenet with --pretrained-teacher and
--pretrained-student.
"""

from .common.cli import main
from .runs.settings import CifarSettings, Distillation, Networks, Training

DEFAULTS = CifarSettings(
    distillation=Distillation(metric="cw2", coef="1e-4"),
    networks=Networks(teacher="resnet34", student="resnet18"),
    training=Training(protocol="kd2m"),
)


def run(settings: CifarSettings) -> None:
    """Train, evaluate and report."""
    from .runs.train import train_and_report  # loads JAX, which --help need not

    train_and_report(settings, settings.dataset)


if __name__ == "__main__":
    main(DEFAULTS, run, module="experiments.cifar", description=__doc__)
