"""TensorBoard's event files, read back by the stock protobuf messages and writer."""

import math
import struct
import warnings

import pytest

from experiments.runs.events import event_writer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of torch, where that is installed
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import RecordWriter


def events(data):
    """The messages of an event file, by the lengths in front of them."""
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def test_scalars_read_back(tmp_path):
    write = event_writer(tmp_path / "tensorboard" / "student")
    written = {
        0: {"loss": 2.5, "distillation_loss/kd:temperature=2": 1e-30},
        300: {"loss": math.inf, "x" * 200: -1.0},
        2**40: {"loss": math.nan},
    }
    for step, scalars in written.items():
        write(step, scalars)
    (file,) = (tmp_path / "tensorboard" / "student").iterdir()
    assert file.name.startswith("events.out.tfevents.")
    first, *rest = events(file.read_bytes())
    assert first.file_version == "brain.Event:2"
    assert [event.step for event in rest] == list(written)
    for event, scalars in zip(rest, written.values(), strict=True):
        assert 0 <= event.wall_time - first.wall_time < 60
        tags = [name.replace(":", "_").replace("=", "_") for name in scalars]
        assert [value.tag for value in event.summary.value] == tags
        expected = pytest.approx(list(scalars.values()), rel=1e-6, nan_ok=True)
        assert [value.simple_value for value in event.summary.value] == expected


def test_the_bytes_are_those_of_the_stock_writer(tmp_path):
    """The checksums too, by which TensorBoard finds that a record is whole."""
    event_writer(tmp_path / "ours")(7, {"loss": 0.5, "test_accuracy": 0.9})
    (ours,) = (tmp_path / "ours").iterdir()
    stock = RecordWriter(str(tmp_path / "stock"))
    for event in events(ours.read_bytes()):
        stock.write(event.SerializeToString())
    stock.close()
    assert (tmp_path / "stock").read_bytes() == ours.read_bytes()
