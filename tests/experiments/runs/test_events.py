"""TensorBoard's events: what they hold, and what they leave behind in the process."""

import gc
import os
import struct
import subprocess
import sys
import threading
import time

from tensorboardX.proto.event_pb2 import Event

from experiments.runs.events import event_writer


def events(data):
    """Yield the messages in an event file's bytes: each has a length, two checksums around it."""
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def test_scalars_are_written_and_nothing_stays_open(tmp_path):
    def held():
        gc.collect()
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    before, end = held(), time.monotonic() + 10
    with event_writer(tmp_path / "run") as writer:
        writer.add_scalar("test_accuracy", 0.5, 7)
    while held() != before and time.monotonic() < end:  # its queue ends in a thread of its own
        time.sleep(0.05)
    assert held() == before
    (file,) = (tmp_path / "run").iterdir()
    found = [(e.step, v.tag, v.simple_value) for e in events(file.read_bytes())
             for v in e.summary.value]  # fmt: skip
    assert found == [(7, "test_accuracy", 0.5)]


def test_torch_is_not_imported_and_can_be_afterwards(tmp_path):
    (tmp_path / "torch.py").write_text("print('torch was imported')\n")
    code = "import experiments.runs.events; print('after'); import torch"
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == ["after", "torch was imported"], done.stderr
