"""The epoch of `bench.gpu` beside a plain PyTorch loop with POT's emd, on the same device."""

import contextlib
import time
from collections.abc import Sequence

import numpy as np
import ot
import torch  # pyright: ignore[reportMissingImports]
from PIL import Image, ImageOps
from torch import nn  # pyright: ignore[reportMissingImports]

from ..data.specs import Dataset
from . import measure
from .gpu import DTYPES, PAIR, epoch, random_images

DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}
WIDTHS = (64, 128, 256, 512)
TARGETS = {"float32": 3.0, "bfloat16": 2.0}


def gpu_torch(
    out: str,
    pair: tuple[str, str] = PAIR,
    images: int = 50_000,
    batch: int = 512,
    repeats: int = 3,
) -> tuple[list[dict], list[str]]:
    """Return rows and notes: our epoch and torch's, and the paper's input pipeline by itself.

    The epochs are in float32 and in bfloat16 (autocast, channels-last). The input pipeline runs on
    the CPU.
    """
    del out  # no plot
    data = random_images(images)
    rows, notes = [], []
    for dtype in DTYPES:
        ours = epoch(data, pair, batch, dtype, repeats)
        torchs = torch_epoch(data, pair, batch, dtype, repeats)
        rows += [ours, {**torchs, "ratio": torchs["ms"] / ours["ms"]}]
        title = f"{dtype}, batch {batch}: PyTorch's epoch over ours"
        notes.append(measure.verdict(title, rows[-1]["ratio"], TARGETS[dtype], least=True))
    rows.append(input_pipeline(data, batch))
    return rows, [*notes, "The input pipeline is in none of the epochs: their images are resident."]


class Block(nn.Module):
    """`kd2m_jax.models.BasicBlock`."""

    def __init__(self, in_width: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.downsample = nn.Sequential()
        if stride != 1 or in_width != width:
            shortcut = nn.Conv2d(in_width, width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(width))

    def forward(self, x):
        """Map ``[n, in_width, h, w]`` to ``[n, width, h / stride, w / stride]``."""
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.downsample(x))


class ResNet(nn.Module):
    """`kd2m_jax.models.ResNet` with the cifar stem; returns features and logits."""

    def __init__(self, depths: Sequence[int], widths: Sequence[int] = WIDTHS):
        super().__init__()
        in_width, blocks = widths[0], []
        self.conv1 = nn.Conv2d(3, in_width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(in_width)
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            for i in range(depth):
                blocks.append(Block(in_width, width, 2 if stage > 0 and i == 0 else 1))
                in_width = width
        self.blocks, self.fc = nn.Sequential(*blocks), nn.Linear(in_width, 10)

    def forward(self, x):
        """Map ``[n, 3, h, w]`` to features ``[n, d]`` and ``[n, 10]``."""
        features = self.blocks(torch.relu(self.bn1(self.conv1(x)))).mean((2, 3))
        return features, self.fc(features)


def torch_epoch(data: Dataset, pair: tuple[str, str], batch: int, dtype: str, repeats: int) -> dict:
    """Return one row: the loop's epochs, without the first, in which cuDNN chooses algorithms."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    layout = torch.channels_last if dtype == "bfloat16" else torch.contiguous_format
    teacher, student = (
        ResNet(DEPTHS[name]).to(torch.device(device)).to(memory_format=layout) for name in pair
    )
    teacher.eval()
    optimizer = torch.optim.SGD(student.parameters(), 0.01, momentum=0.9)
    images, labels = (torch.tensor(a, device=device) for a in data.train)
    images, labels = images.permute(0, 3, 1, 2), labels.long()
    autocast = contextlib.nullcontext()
    if dtype == "bfloat16":
        autocast = torch.autocast(device, torch.bfloat16)

    def one_epoch():
        order, loss = torch.randperm(len(images), device=device), torch.zeros(())
        for i in range(len(images) // batch):
            rows = order[i * batch : (i + 1) * batch]
            x = _augmented(images[rows], data).contiguous(memory_format=layout)
            with autocast:
                with torch.no_grad():
                    seen_by_teacher, _ = teacher(x)
                features, logits = student(x)
            loss = nn.functional.cross_entropy(logits.float(), labels[rows])
            loss = loss + 1e-3 * emd(features.float(), seen_by_teacher.float())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        loss.item()  # waits for the GPU

    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        one_epoch()
        times.append(1e3 * (time.perf_counter() - start))
    q1, median, q3 = (float(q) for q in np.percentile(times[1:], [25, 50, 75]))
    seen = len(images) // batch * batch
    row = {"what": "torch + emd", "dtype": dtype, "batch": batch, "ms": median, "q1": q1, "q3": q3}
    return row | {"images/s": 1e3 * seen / median}


def emd(features, seen_by_teacher):
    """Compute the paper's loss: torch's costs, POT's plan on the CPU, torch's gradient."""
    cost = torch.cdist(features, seen_by_teacher) ** 2
    plan = ot.emd([], [], cost.detach().cpu().numpy(), numItermax=1_000_000)
    return (torch.as_tensor(plan, dtype=cost.dtype, device=cost.device) * cost).sum()


def _augmented(x, data: Dataset):
    """Do what `augment.preprocess` does, for a batch ``[n, 3, h, w]`` of bytes."""
    n, _, h, w = x.shape
    pad = data.crop_padding
    x = nn.functional.pad(x, (pad, pad, pad, pad))
    top, left = torch.randint(0, 2 * pad + 1, (2, n, 1), device=x.device)
    rows = top + torch.arange(h, device=x.device)
    columns = left + torch.arange(w, device=x.device)
    columns = torch.where(torch.rand(n, 1, device=x.device) < 0.5, columns.flip(1), columns)
    image = torch.arange(n, device=x.device)[:, None, None]
    x = x.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]]
    mean, std = (torch.tensor(v, device=x.device) for v in (data.mean, data.std))
    return ((x.float() - mean) / std).permute(0, 3, 1, 2)


def input_pipeline(data: Dataset, batch: int) -> dict:
    """Return one row: an epoch's images one by one through PIL into batches, as in torchvision."""

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return len(data.train[0])

        def __getitem__(self, i):
            pad, (h, w) = data.crop_padding, data.train[0].shape[1:3]
            image = ImageOps.expand(Image.fromarray(data.train[0][i]), pad)
            top, left = np.random.randint(0, 2 * pad + 1, 2)  # noqa: NPY002  (as torchvision)
            image = image.crop((left, top, left + w, top + h))
            if np.random.random() < 0.5:  # noqa: NPY002
                image = ImageOps.mirror(image)
            x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
            mean, std = (torch.tensor(v)[:, None, None] for v in (data.mean, data.std))
            return (x - mean) / std, int(data.train[1][i])

    loader = torch.utils.data.DataLoader(Images(), batch, shuffle=True, drop_last=True)
    start = time.perf_counter()
    seen = sum(len(labels) for _, labels in loader)
    seconds = time.perf_counter() - start
    row = {"what": "the paper's input pipeline, alone", "batch": batch, "ms": 1e3 * seconds}
    return row | {"images/s": seen / seconds}
