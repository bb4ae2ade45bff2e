"""Checkpoints as common tools write them, and files that are made to harm."""

import json
import logging
import zipfile

import numpy as np
import pytest
from torch_files import (
    make_net,
    pickled_dict,
    pickled_state,
    pickled_tensor,
    plain,
    torch_state,
    write_pth,
    write_safetensors,
)

from kd2m_jax import models
from kd2m_jax.models import _torch_files


def loaded(path):
    model = models.load_torch_weights(make_net(), path)
    return np.asarray(model.fc.bias[...])


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "model.",
        "backbone.",
        "module._orig_mod.",
        "net.encoder.",
        "layer1.",
    ],
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_prefix_before_all_names_is_left_out(prefix, suffix, tmp_path):
    state, path = torch_state(), tmp_path / f"a.{suffix}"
    if suffix == "pth":
        write_pth(path, *pickled_state(state, prefix=prefix))
    else:
        write_safetensors(path, {prefix + name: array for name, array in state.items()})
    np.testing.assert_array_equal(loaded(path), state["fc.bias"])


def test_what_lies_beside_the_network_is_left_out(tmp_path):
    state = torch_state()
    larger = {f"backbone.{name}": array for name, array in state.items()}
    larger |= {"projector.0.weight": np.ones((4, 4)), "centre": np.ones(3)}
    path = write_safetensors(tmp_path / "a.safetensors", larger)
    np.testing.assert_array_equal(loaded(path), state["fc.bias"])


def test_two_networks_in_one_file_are_refused(tmp_path):
    state = torch_state()
    both = {
        f"{who}.{name}": array for who in ("student", "teacher") for name, array in state.items()
    }
    path = write_safetensors(tmp_path / "a.safetensors", both)
    with pytest.raises(
        ValueError, match=r"several networks, with the prefixes student\., teacher\."
    ):
        loaded(path)


@pytest.mark.parametrize("key", ["model_state_dict", "net", "network", "weights"])
def test_a_state_dict_under_a_usual_name(key, tmp_path):
    state = torch_state()
    body, storages = pickled_state(state)
    whole = pickled_dict({"acc": plain(91.0), "epoch": plain(3), key: body})
    np.testing.assert_array_equal(
        loaded(write_pth(tmp_path / "a.pth", whole, storages)), state["fc.bias"]
    )


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema"])
def test_averaged_weights_are_taken_before_the_raw_ones(key, tmp_path, caplog):
    state = torch_state()
    body, storages = pickled_state(state)
    raw, _ = pickled_state({name: 0 * array for name, array in state.items()})
    path = write_pth(tmp_path / "a.pth", pickled_dict({"state_dict": raw, key: body}), storages)
    with caplog.at_level(logging.INFO, logger="kd2m_jax"):
        np.testing.assert_array_equal(loaded(path), state["fc.bias"])
    assert f"{key}, the averaged weights" in caplog.text


def test_compressed_parts_are_refused_before_they_are_read(tmp_path):
    """3 MB could take 6 GB: torch.save never compresses."""
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data/0", bytes(10**7))
    assert path.stat().st_size < 10**5
    with pytest.raises(ValueError, match="compressed, which torch never does"):
        loaded(path)


@pytest.mark.parametrize("name", ["_rebuild_tensor_v2", "_rebuild_parameter"])
def test_a_pickle_cannot_set_attributes_of_ours(name, tmp_path):
    """BUILD, on a function that the file may name: its state goes into the function's dict."""
    body = b"ctorch._utils\n%s\n}(Vevil\nVyes\nub" % name.encode()
    with pytest.raises(ValueError, match="not a state dict"):
        loaded(write_pth(tmp_path / "a.pth", body))
    functions = [f for f in _torch_files._GLOBALS.values() if not isinstance(f, type)]
    assert functions and not any(vars(function) for function in functions)


def edited(path, edit):
    """Write a safetensors file whose header is changed."""
    write_safetensors(path, torch_state())
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    text = edit(json.loads(data[8:begin]))
    text = (text if isinstance(text, str) else json.dumps(text)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[begin:])
    return path


def overlapping(header):
    first, second = [name for name in header if name != "__metadata__"][:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]
    return header


def emptied(header):
    header["fc.bias"]["shape"] = [0]
    return header


def negative(header):
    header["fc.bias"]["shape"] = [-1]
    return header


def shortened(header):
    del header["fc.bias"]
    return header


def twice(header):
    entry = json.dumps({"fc.bias": header["fc.bias"]})[1:-1]
    return json.dumps(header)[:-1] + ", " + entry + "}"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (overlapping, "do not lie one after the other"),
        (shortened, "do not lie one after the other|its tensors take"),
        (emptied, r"'fc.bias' has the shape \[0\]"),
        (negative, r"'fc.bias' has the shape \[-1\]"),
        (twice, "a name is there twice"),
    ],
)
def test_a_safetensors_header_that_lies_is_refused(edit, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        loaded(edited(tmp_path / "a.safetensors", edit))


def test_a_storage_is_read_once_however_it_is_named(tmp_path, monkeypatch):
    """Thousands of tensors of one storage, each of another size, could take 6 GB."""
    tensors = {
        f"t{i}": pickled_tensor("FloatStorage", "0", 100 - i, 0, (5,), (1,)) for i in range(9)
    }
    path = write_pth(tmp_path / "a.pth", pickled_dict(tensors), {"0": bytes(400)})
    read, names = zipfile.ZipFile.read, []
    monkeypatch.setattr(
        zipfile.ZipFile, "read", lambda self, name: names.append(name) or read(self, name)
    )
    assert len(_torch_files.read_tensors(path)) == 9
    assert names.count("archive/data/0") == 1


def test_a_pickle_that_holds_itself_ends(tmp_path):
    body = b"}q\x00(Vmodel\nh\x00Vx\n}u"
    with pytest.raises(ValueError, match=r"more than eight dicts|not a tensor"):
        loaded(write_pth(tmp_path / "a.pth", body))


def test_counters_and_settings_beside_the_weights_are_left_out(tmp_path):
    """As torch.optim.swa_utils.AveragedModel and EMA helpers write them."""
    state = torch_state()
    body, storages = pickled_state(state, prefix="module.")
    items = {"n_averaged": pickled_tensor("LongStorage", "n", 1, 0, (), ())}
    whole = pickled_dict({"ema": plain({"decay": 0.99}), "model": body})
    path = write_pth(tmp_path / "a.pth", whole, storages)
    np.testing.assert_array_equal(loaded(path), state["fc.bias"])
    # Beside the network itself, in one dict.
    entries = body[: -len(b"u")] + plain("n_averaged") + items["n_averaged"] + b"u"
    path = write_pth(tmp_path / "b.pth", entries, storages | {"n": bytes(8)})
    np.testing.assert_array_equal(loaded(path), state["fc.bias"])


def test_names_that_are_no_strings_are_named(tmp_path):
    body = pickled_dict({3: pickled_tensor("FloatStorage", "0", 5, 0, (5,), (1,))})
    with pytest.raises(ValueError, match="an entry's name is 3, not a string"):
        loaded(write_pth(tmp_path / "a.pth", body, {"0": bytes(20)}))
