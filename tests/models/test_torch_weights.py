"""Torch weights: the same network as in NumPy and in torch, and files that are not trusted."""

import os
import pickle
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from torch_files import (
    NETS,
    assert_same_outputs,
    images,
    make_net,
    outputs,
    pickled_dict,
    pickled_state,
    pickled_tensor,
    plain,
    torch_state,
    write_pth,
    write_safetensors,
)

from kd2m_jax import models

slow_nets = [pytest.param(name, marks=pytest.mark.slow) for name in list(NETS)[3:]]


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("kind", [*list(NETS)[:3], *slow_nets])
def test_a_loaded_network_computes_what_numpy_does(tmp_path, kind, stem):
    state = torch_state(kind, stem=stem)
    model = make_net(kind, stem=stem)
    returned = models.load_torch_weights(model, write_safetensors(tmp_path / "a", state))
    assert returned is model
    assert_same_outputs(model, state)


@pytest.mark.parametrize(
    ("storage", "name", "dtype"),
    [
        ("DoubleStorage", "F64", np.float64),
        ("FloatStorage", "F32", np.float32),
        ("HalfStorage", "F16", np.float16),
        ("BFloat16Storage", "BF16", jnp.bfloat16),
    ],
)
def test_both_formats_in_every_precision(tmp_path, storage, name, dtype):
    state = torch_state()
    pth = write_pth(tmp_path / "a.pth", *pickled_state(state, storage, dtype))
    for path in (pth, write_safetensors(tmp_path / "a.safetensors", state, name, dtype)):
        model = models.load_torch_weights(make_net(), path)
        kernel = state["layer2.0.conv1.weight"].astype(dtype).astype(np.float32)
        loaded = model.stages[1][0].conv1.kernel[...]
        np.testing.assert_array_equal(loaded, kernel.transpose(2, 3, 1, 0))
        assert loaded.dtype == jnp.float32
        np.testing.assert_array_equal(
            model.stages[0][1].bn2.var[...],
            state["layer1.1.bn2.running_var"].astype(dtype).astype(np.float32),
        )


def test_a_checkpoint_around_the_state_dict(tmp_path):
    state = torch_state()
    body, storages = pickled_state(state, prefix="module.", parameter=True)
    for key in ("state_dict", "model"):
        wrapped = pickled_dict({"epoch": plain(3), key: body})
        path = write_pth(tmp_path / key, wrapped, storages)
        assert_same_outputs(models.load_torch_weights(make_net(), path), state)


def test_views_of_a_shared_storage(tmp_path):
    # fc.weight is stored transposed and fc.bias lies behind it, as in a flattened optimizer.
    state = torch_state()
    weight, bias = state["fc.weight"], state["fc.bias"]
    rest = {name: array for name, array in state.items() if not name.startswith("fc.")}
    _, storages = pickled_state(rest)
    storages["fc"] = weight.T.tobytes() + bias.tobytes()
    size, (rows, columns) = weight.size + bias.size, weight.shape
    entries = {
        name: pickled_tensor(
            "FloatStorage" if array.ndim else "LongStorage",
            str(key),
            array.size,
            0,
            array.shape,
            [step // array.itemsize for step in array.strides],
        )
        for key, (name, array) in enumerate(rest.items())
    }
    shared = ("FloatStorage", "fc", size)
    entries["fc.weight"] = pickled_tensor(*shared, 0, (rows, columns), (1, rows))
    entries["fc.bias"] = pickled_tensor(*shared, weight.size, (rows,), (1,))
    path = write_pth(tmp_path / "a", pickled_dict(entries), storages)
    assert_same_outputs(models.load_torch_weights(make_net(), path), state)


def test_every_misfit_is_listed_and_nothing_is_changed(tmp_path):
    state = torch_state()
    model = models.load_torch_weights(make_net(), write_safetensors(tmp_path / "a", state))
    before = nnx.clone(nnx.state(model))
    state = {name: array + 1 for name, array in state.items()}
    state["extra.weight"] = np.ones(2, np.float32)
    del state["layer1.0.bn1.running_mean"]
    state["bn1.bias"] = np.ones(9, np.float32)
    with pytest.raises(ValueError) as error:
        models.load_torch_weights(model, write_safetensors(tmp_path / "b", state))
    message = str(error.value)
    assert "missing from the file: layer1.0.bn1.running_mean;" in message
    assert "not in the model: extra.weight;" in message
    assert message.endswith("shapes in the file and in the model: bn1.bias (9,) and (8,)")
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)


def test_long_lists_are_cut(tmp_path):
    path = write_safetensors(tmp_path / "a", {"x": np.ones(1)})
    total = sum(not name.endswith("tracked") for name in torch_state())
    with pytest.raises(ValueError, match=rf"from the file: .* and {total - 6} more; not in"):
        models.load_torch_weights(make_net(), path)


@pytest.mark.parametrize(("of_file", "of_model"), [("imagenet", "cifar"), ("cifar", "imagenet")])
def test_the_other_stem_is_named(tmp_path, of_file, of_model):
    path = write_safetensors(tmp_path / "a", torch_state(stem=of_file))
    with pytest.raises(ValueError, match=rf'make the model with stem="{of_file}"'):
        models.load_torch_weights(make_net(stem=of_model), path)


def test_other_channels_are_not_taken_for_another_stem(tmp_path):
    path = write_safetensors(tmp_path / "a", torch_state(in_channels=1))
    with pytest.raises(ValueError, match=r"conv1.weight \(3, 3, 1, 8\) and \(3, 3, 3, 8\)$"):
        models.load_torch_weights(make_net(), path)


def test_replacing_the_head(tmp_path, caplog):
    own, other = torch_state(num_classes=5), torch_state(num_classes=9)
    own = {name: array + 1 for name, array in own.items()}
    model = models.load_torch_weights(make_net(), write_safetensors(tmp_path / "own", own))
    path = write_safetensors(tmp_path / "other", other)
    with pytest.raises(ValueError, match="replace_head=True keeps the model's own head"):
        models.load_torch_weights(model, path)
    with caplog.at_level("INFO"):
        models.load_torch_weights(model, path, replace_head=True)
    assert "head replaced" in caplog.text
    merged = other | {name: own[name] for name in ("fc.weight", "fc.bias")}
    assert_same_outputs(model, merged)
    # One for the same classes is taken as it is.
    plain = torch_state(num_classes=5)
    same = write_safetensors(tmp_path / "same", plain)
    assert_same_outputs(models.load_torch_weights(make_net(), same, replace_head=True), plain)
    # A file without a head (timm's num_classes=0) is enough.
    headless = {name: array for name, array in other.items() if not name.startswith("fc.")}
    path = write_safetensors(tmp_path / "headless", headless)
    models.load_torch_weights(model, path, replace_head=True)


@pytest.mark.parametrize(
    "attack",
    [
        b"cos\nsystem\n(V%s\ntR",  # GLOBAL
        b"(V%s\nios\nsystem\n",  # INST
        b"(cos\nsystem\nV%s\no",  # OBJ
        b"\x8c\x02os\x8c\x06system\x93(V%s\ntR",  # STACK_GLOBAL
        b"cbuiltins\nexec\n(Vimport os; os.system('%s')\ntR",
        b"cbuiltins\neval\n(V__import__('os').system('%s')\ntR",
    ],
)
def test_pickled_code_does_not_run(tmp_path, attack):
    marker = tmp_path / "ran"
    body = attack % f"touch {marker}".encode()
    pickle.loads(b"\x80\x04" + body + b".")
    assert marker.exists()  # the attack works where nobody defends
    marker.unlink()
    for payload in (body, pickled_dict({"fc.weight": body})):
        with pytest.raises(ValueError, match=r"it holds (os|builtins)\.\w+; only tensors"):
            models.load_torch_weights(make_net(), write_pth(tmp_path / "a.pth", payload))
        assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["torch\nload", "torch._utils\n_import_dotted_name", "torch\nstorage.os.system",
             "collections\nOrderedDict.fromkeys", "torch\nFloatStorage.os"]
)  # fmt: skip
def test_other_names_are_refused(tmp_path, name):
    path = write_pth(tmp_path / "a.pth", b"c%s\n" % name.encode())
    with pytest.raises(ValueError, match="only tensors in plain containers are read"):
        models.load_torch_weights(make_net(), path)


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (1, (5,), (1,)),
        (0, (6,), (1,)),
        (0, (2,), (5,)),
        (4, (2,), (-1,)),
        (-1, (5,), (1,)),
        (0, (1 << 40, 5), (1 << 20, 1)),
        (0, (5, -1), (1, 1)),
    ],
)
def test_tensors_cannot_reach_beyond_their_storage(tmp_path, offset, shape, strides):
    tensor = pickled_tensor("FloatStorage", "0", 5, offset, shape, strides)
    path = write_pth(tmp_path / "a.pth", pickled_dict({"fc.bias": tensor}), {"0": b"\0" * 20})
    with pytest.raises(ValueError, match="reaches beyond its 5 values"):
        models.load_torch_weights(make_net(), path)


@pytest.mark.parametrize(
    ("body", "storages", "byteorder", "message"),
    [
        (b"]", {}, b"little", "it holds a list, not a state dict"),
        (pickled_dict({"epoch": plain(3)}), {}, b"little", "entry 'epoch' is a int, not a tensor"),
        (pickled_dict({}), {}, b"big", "big-endian"),
        (
            pickled_dict({"fc.bias": pickled_tensor("CharStorage", "0", 5, 0, (5,), (1,))}),
            {"0": b"\0" * 5},
            b"little",
            "values of type CharStorage are not read",
        ),
        (
            pickled_dict({"fc.bias": pickled_tensor("FloatStorage", "0", 5, 0, (5,), (1,))}),
            {},
            b"little",
            "cannot be read as a checkpoint: .*archive/data/0",
        ),
    ],
)
def test_files_that_hold_something_else(tmp_path, body, storages, byteorder, message):
    path = write_pth(tmp_path / "a.pth", body, storages, byteorder)
    with pytest.raises(ValueError, match=message):
        models.load_torch_weights(make_net(), path)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_truncated_files_are_refused(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    state = torch_state()
    if suffix == "pth":
        write_pth(path, *pickled_state(state))
    else:
        write_safetensors(path, state)
    whole = path.read_bytes()
    for length in (0, 5, 9, 20, *range(100, len(whole), len(whole) // 10), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cannot be read as a checkpoint|is neither"):
            models.load_torch_weights(make_net(), path)


def test_files_from_before_torch_1_6_say_how_to_write_them_anew(tmp_path):
    path = tmp_path / "old.pth"
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2))
    with pytest.raises(ValueError, match=r"torch\.save\(torch\.load\("):
        models.load_torch_weights(make_net(), path)


def test_downloads_from_the_hub(tmp_path, monkeypatch):
    state = torch_state()
    path = write_safetensors(tmp_path / "a", state)
    asked = []

    def download(repo, file):
        asked.append((repo, file))
        if repo == "timm/none":
            raise RuntimeError("no network")
        return os.fspath(path)

    hub = types.SimpleNamespace(hf_hub_download=download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    model = models.load_torch_weights(make_net(), "hf:timm/some.model")
    assert_same_outputs(model, state)
    with pytest.raises(OSError, match=r"could not download .* of hf:timm/none: no network"):
        models.load_torch_weights(make_net(), "hf:timm/none")
    assert asked == [("timm/some.model", "model.safetensors"), ("timm/none", "model.safetensors")]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        models.load_torch_weights(make_net(), "hf:timm/some.model")


def torch_resnet(torch, name, num_classes, stem):
    """Torchvision's ResNet in plain torch, with random weights, in eval mode."""
    from torch import nn

    def conv(fan_in, width, kernel, stride=1):
        return nn.Conv2d(fan_in, width, kernel, stride, kernel // 2, bias=False)

    class Block(nn.Module):
        def __init__(self, fan_in, width, stride):
            super().__init__()
            self.deep = name in ("resnet50", "resnet101")
            outer = 4 * width if self.deep else width
            self.conv1 = conv(fan_in, width, 1) if self.deep else conv(fan_in, width, 3, stride)
            self.bn1 = nn.BatchNorm2d(width)
            self.conv2 = conv(width, width, 3, stride if self.deep else 1)
            self.bn2 = nn.BatchNorm2d(width)
            if self.deep:
                self.conv3 = conv(width, outer, 1)
                self.bn3 = nn.BatchNorm2d(outer)
            if stride != 1 or fan_in != outer:
                self.downsample = nn.Sequential(
                    conv(fan_in, outer, 1, stride), nn.BatchNorm2d(outer)
                )

        def forward(self, x):
            y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
            y = self.bn3(self.conv3(y.relu())) if self.deep else y
            return (y + (self.downsample(x) if hasattr(self, "downsample") else x)).relu()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            large = stem == "imagenet"
            self.conv1 = conv(3, 64, 7, 2) if large else conv(3, 64, 3)
            self.bn1 = nn.BatchNorm2d(64)
            self.pool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
            depths = {"resnet18": (2, 2, 2, 2), "resnet101": (3, 4, 23, 3)}.get(name, (3, 4, 6, 3))
            fan_in = 64
            for i, depth in enumerate(depths):
                width, blocks = 64 * 2**i, []
                for j in range(depth):
                    blocks.append(Block(fan_in, width, 2 if i and not j else 1))
                    fan_in = 4 * width if blocks[-1].deep else width
                setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            self.fc = nn.Linear(fan_in, num_classes)

        def forward(self, x):
            x = self.pool(self.bn1(self.conv1(x)).relu())
            x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
            features = x.mean((2, 3))
            return features, self.fc(features)

    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1)
                module.bias.normal_(0, 0.2)
                module.momentum = 1
        # Running statistics of real activations: arbitrary ones make them grow with the depth.
        net(torch.randn(8, 3, 64, 64) + 2 * torch.randn(8, 3, 1, 1))
    return net.eval()


deep = pytest.param("resnet101", marks=pytest.mark.slow)


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", deep])
def test_torch_computes_the_same(tmp_path, name, stem):
    torch = pytest.importorskip("torch")
    net = torch_resnet(torch, name, 10, stem)
    torch.save(net.state_dict(), tmp_path / "a.pth")
    torch.save({"state_dict": net.state_dict(keep_vars=True)}, tmp_path / "b.pth")
    arrays = {key: value.numpy() for key, value in net.state_dict().items()}
    write_safetensors(tmp_path / "c.safetensors", arrays)
    x = images(side=64 if stem == "imagenet" else 32).astype(float)
    with torch.no_grad():
        expected = net.double()(torch.from_numpy(x.transpose(0, 3, 1, 2)))
    # In float32 rounding adds up over the layers, torch's no less; float64 leaves no doubt.
    for file, dtype, tolerance in (
        ("a.pth", jnp.float32, 1e-4),
        ("b.pth", jnp.float32, 1e-4),
        ("c.safetensors", jnp.float32, 1e-4),
        ("a.pth", jnp.float64, 1e-11),
    ):
        with jax.enable_x64(dtype is jnp.float64):
            options = {"num_classes": 10, "image_shape": (32, 32, 3), "stem": stem}
            model = nnx.eval_shape(
                lambda: models.build(name, **options, dtype=dtype, rngs=nnx.Rngs(0))  # noqa: B023
            )
            models.load_torch_weights(model, tmp_path / file).eval()
            ours = outputs(model, jnp.asarray(x, dtype))
        for what, y, y_torch in zip(("features", "logits"), ours, expected, strict=True):
            scale = np.abs(y_torch.numpy()).max()
            difference = np.abs(np.asarray(y) - y_torch.numpy()).max()
            print(f"{name} {stem} {file} {y.dtype} {what}: {difference:.1e} of {scale:.1f}")
            assert difference < tolerance * max(1, scale)
            assert y_torch.std(0).max() > 0.1  # the images matter
