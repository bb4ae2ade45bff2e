"""Distil on pictures of your own, in a folder per class.

    python -m experiments.images --train=photos/train --test=photos/test

PNG, JPEG and WebP files of any size, grey or with transparency, turned as their EXIF data says;
all become --size x --size in colour. Without --test a fifth of each class is tested on. With
--labels-per-class=N only N pictures of a class keep their label: the others, without, are what
student and teacher are compared on. What fits is kept in memory, more is read anew each epoch.
"""

from .common.cli import main
from .runs.settings import Distillation, ImagesSettings, Networks, Training

DEFAULTS = ImagesSettings(
    distillation=Distillation(metric="cw2", coef="1e-3"),
    networks=Networks(teacher="resnet20", student="resnet8"),
    training=Training(protocol="digits"),
)


def run(settings: ImagesSettings) -> None:
    """Read the pictures, train, evaluate and report."""
    from .data.folders import Folders, load_folders  # these load JAX
    from .runs.settings import check
    from .runs.train import train_and_report

    check(settings)
    folders = Folders(
        train=settings.train,
        dataset=settings.dataset,
        test=settings.test,
        size=settings.size,
        val_fraction=settings.val_fraction,
        labels_per_class=settings.labels_per_class,
        skip_unreadable=settings.skip_unreadable,
        seed=settings.training.seed,
    )
    train_and_report(settings, lambda: load_folders(folders))


if __name__ == "__main__":
    main(DEFAULTS, run, module="experiments.images", description=__doc__)
