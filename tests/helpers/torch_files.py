"""Torch's files and torch's ResNet in NumPy, written from their descriptions."""

import json
import pickle
import zipfile

import numpy as np
from flax import nnx
from numpy.lib.stride_tricks import sliding_window_view

from kd2m_jax import models

NETS = {
    "basic": (models.BasicBlock, (2, 1), (8, 8, 12)),
    "bottleneck": (models.Bottleneck, (1, 2), (8, 4, 6)),
    "resnet8": (models.BasicBlock, (1, 1, 1), (16, 16, 32, 64)),
    "resnet18": (models.BasicBlock, (2, 2, 2, 2), (64, 64, 128, 256, 512)),
}


def make_net(kind="basic", num_classes=5, in_channels=3, stem="cifar"):
    """Make a ResNet without values, which loading fills."""
    options = {"in_channels": in_channels, "stem": stem}
    return nnx.eval_shape(
        lambda: models.ResNet(*NETS[kind], num_classes, **options, rngs=nnx.Rngs(0))
    )


def torch_state(kind="basic", num_classes=5, in_channels=3, stem="cifar"):
    """Random weights under torchvision's names and in its layout; the names are written here."""
    rng = np.random.default_rng(0)
    state = {}

    def conv_norm(conv, norm, fan_in, width, kernel):
        shape = (width, fan_in, kernel, kernel)
        state[f"{conv}.weight"] = rng.normal(0, (fan_in * kernel**2) ** -0.5, shape)
        state[f"{norm}.weight"] = rng.uniform(0.5, 1.5, width)
        state[f"{norm}.bias"] = rng.normal(0, 0.5, width)
        state[f"{norm}.running_mean"] = rng.normal(0, 0.5, width)
        state[f"{norm}.running_var"] = rng.uniform(0.5, 1.5, width)
        state[f"{norm}.num_batches_tracked"] = np.array(7)

    block, depths, (width, *widths) = NETS[kind]
    conv_norm("conv1", "bn1", in_channels, width, 7 if stem == "imagenet" else 3)
    for stage, (depth, inner) in enumerate(zip(depths, widths, strict=True), start=1):
        for i in range(depth):
            name = f"layer{stage}.{i}"
            kernels = (3, 3) if block is models.BasicBlock else (1, 3, 1)
            outer = inner * block.expansion
            sizes = (width, *[inner] * (len(kernels) - 1), outer)
            for j, kernel in enumerate(kernels):
                names = f"{name}.conv{j + 1}", f"{name}.bn{j + 1}"
                conv_norm(*names, sizes[j], sizes[j + 1], kernel)
            if width != outer or (stage > 1 and i == 0):
                conv_norm(f"{name}.downsample.0", f"{name}.downsample.1", width, outer, 1)
            width = outer
    state["fc.weight"] = rng.normal(0, width**-0.5, (num_classes, width))
    state["fc.bias"] = rng.normal(0, 1, num_classes)
    return {name: np.asarray(a, np.float32 if a.ndim else None) for name, a in state.items()}


def numpy_forward(state, x):
    """Features and logits in float64 of torchvision's ResNet in eval mode; x is [n, h, w, c]."""

    def conv_norm(x, conv, norm, stride):
        weight = state[f"{conv}.weight"].astype(float)
        pad = weight.shape[-1] // 2
        x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        windows = sliding_window_view(x, weight.shape[2:], (2, 3))[:, :, ::stride, ::stride]
        x = np.einsum("nchwij,ocij->nohw", windows, weight)
        scale, bias, mean, var = (
            state[f"{norm}.{leaf}"].astype(float)[:, None, None]
            for leaf in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

    x = x.astype(float).transpose(0, 3, 1, 2)
    seven = state["conv1.weight"].shape[-1] == 7
    x = np.maximum(conv_norm(x, "conv1", "bn1", 2 if seven else 1), 0)
    if seven:
        x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
        x = sliding_window_view(x, (3, 3), (2, 3))[:, :, ::2, ::2].max((-1, -2))
    for name in dict.fromkeys(".".join(n.split(".")[:2]) for n in state if n.startswith("layer")):
        stride = 2 if name.endswith(".0") and not name.startswith("layer1") else 1
        last = 3 if f"{name}.conv3.weight" in state else 2
        y = x
        for j in range(1, last + 1):
            # The stride is on the first 3x3: conv1 of a basic block, conv2 of a bottleneck.
            y = conv_norm(y, f"{name}.conv{j}", f"{name}.bn{j}", stride if j == last - 1 else 1)
            y = np.maximum(y, 0) if j < last else y
        if f"{name}.downsample.0.weight" in state:
            x = conv_norm(x, f"{name}.downsample.0", f"{name}.downsample.1", stride)
        x = np.maximum(x + y, 0)
    features = x.mean((2, 3))
    return features, features @ state["fc.weight"].astype(float).T + state["fc.bias"]


def write_safetensors(path, state, dtype="F32", numpy_dtype=np.float32):
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, array in state.items():
        counter = name.endswith("num_batches_tracked")
        data = np.asarray(array, np.int64 if counter else numpy_dtype).tobytes()
        entry = {"dtype": "I64" if counter else dtype, "shape": list(array.shape)}
        header[name] = entry | {"data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def plain(value):
    """Pickle a plain value, without its frame, to be put into a hand-written one."""
    return pickle.dumps(value, 2)[2:-1]


def pickled_tensor(storage, key, size, offset, shape, strides, parameter=False):
    """Write what torch.save pickles for a tensor: a call, with a persistent id for the storage."""
    pid = b"(" + plain("storage") + b"ctorch\n%s\n" % storage.encode()
    pid += plain(key) + plain("cpu") + plain(size) + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    rest = plain(offset) + plain(tuple(shape)) + plain(tuple(strides)) + plain(False) + hooks
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid + rest + b"tR"
    if parameter:
        tensor = b"ctorch._utils\n_rebuild_parameter\n(" + tensor + plain(True) + hooks + b"tR"
    return tensor


def pickled_dict(items):
    """Pickle an OrderedDict of values that are pickled already."""
    pairs = b"".join(plain(name) + value for name, value in items.items())
    return b"ccollections\nOrderedDict\n)R(" + pairs + b"u"


def write_pth(path, body, storages=(), byteorder=b"little"):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + body + b".")
        archive.writestr("archive/byteorder", byteorder)
        for key, data in dict(storages).items():
            archive.writestr(f"archive/data/{key}", data)
    return path


def pickled_state(state, storage="FloatStorage", dtype=np.float32, prefix="", parameter=False):
    """Make a state dict and its storages, each tensor with its own."""
    entries, storages = {}, {}
    for key, (name, array) in enumerate(state.items()):
        kind, kept = (storage, array.astype(dtype)) if array.ndim else ("LongStorage", array)
        strides = [step // kept.itemsize for step in kept.strides]
        tensor = pickled_tensor(kind, str(key), kept.size, 0, kept.shape, strides, parameter)
        entries[prefix + name], storages[str(key)] = tensor, kept.tobytes()
    return pickled_dict(entries), storages


def images(side=16, channels=3):
    # Noise and a colour: pooling averages noise away, and outputs would hardly depend on it.
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(3, side, side, channels))
    return (noise + rng.normal(0, 2, (3, 1, 1, channels))).astype(np.float32)


@nnx.jit
def outputs(model, x):
    out = model(x)
    return out.features, out.logits


def assert_same_outputs(model, state, atol=1e-4):
    model.eval()
    x = images(channels=model.in_channels)
    features, logits = numpy_forward(state, x)
    ours = outputs(model, x)
    assert features.std(0).max() > 0.1  # the images matter
    np.testing.assert_allclose(ours[0], features, atol=atol)
    np.testing.assert_allclose(ours[1], logits, atol=atol)
