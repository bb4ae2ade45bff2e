"""Folders of pictures of all kinds that people have: generated, three classes of shapes."""

import pathlib

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("disc", "square", "stripes")
_ORIENTATION = 0x0112  # EXIF's tag
_TURNED = 6  # to be turned by 90 degrees clockwise


def shape(kind: str, rng: np.random.Generator) -> Image.Image:
    """Draw one of the classes in some colour at some place, on a picture of some size."""
    width, height = (int(n) for n in rng.integers(30, 90, 2))
    back, front = (tuple(int(v) for v in rng.integers(*part, 3)) for part in ((0, 90), (160, 256)))
    image = Image.new("RGB", (width, height), back)
    draw, side = ImageDraw.Draw(image), min(width, height) * 0.6
    left, top = (width - side) / 2, (height - side) / 2
    if kind == "disc":
        draw.ellipse((left, top, left + side, top + side), fill=front)
    elif kind == "square":
        draw.rectangle((left, top, left + side, top + side), fill=front)
    else:
        for x in range(0, width, 6):
            draw.line((x, 0, x, height), fill=front, width=2)
    return image


def write(folder: pathlib.Path, count: int, seed: int = 0, *, broken: int = 0) -> None:
    """Write so many pictures per class: grey, with transparency, turned by EXIF, in all formats."""
    rng = np.random.default_rng(seed)
    for kind in CLASSES:
        (folder / kind).mkdir(parents=True)
        for i in range(count):
            image, where = shape(kind, rng), folder / kind / f"{i:04d}"
            match i % 5:
                case 0:
                    image.save(where.with_suffix(".png"))
                case 1:
                    image.convert("L").save(where.with_suffix(".PNG"))
                case 2:
                    image.convert("RGBA").save(where.with_suffix(".webp"), lossless=True)
                case 3:
                    exif = Image.Exif()
                    exif[_ORIENTATION] = _TURNED
                    turned = image.transpose(Image.Transpose.ROTATE_90)
                    turned.save(where.with_suffix(".jpg"), exif=exif)
                case 4:
                    image.save(where.with_suffix(".jpeg"))
    (folder / ".hidden").mkdir(exist_ok=True)
    (folder / CLASSES[0] / "notes.txt").write_text("no picture")
    for i in range(broken):
        whole = (folder / CLASSES[0] / "0000.png").read_bytes()
        (folder / CLASSES[1] / f"broken{i}.png").write_bytes(whole[: len(whole) // 2])
