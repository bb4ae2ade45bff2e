"""Scalars in TensorBoard's event files, written by hand: tensorboardX imports torch, which is slow.

A file is a row of records, each one `Event` message of TensorBoard in protobuf's encoding.
"""

import pathlib
import re
import socket
import struct
import time
from collections.abc import Callable, Mapping


def event_writer(folder: pathlib.Path) -> Callable[[int, Mapping[str, float]], None]:
    """Start an event file in a new folder; return ``write(step, scalars)``, which appends to it."""
    folder.mkdir(parents=True)
    file = folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
    file.write_bytes(_record(_double(1, time.time()) + _bytes(3, b"brain.Event:2")))

    def write(step: int, scalars: Mapping[str, float]) -> None:
        values = b"".join(_bytes(1, _scalar(name, value)) for name, value in scalars.items())
        event = _double(1, time.time()) + b"\x10" + _varint(step) + _bytes(5, values)
        with file.open("ab") as out:
            out.write(_record(event))

    return write


def _scalar(name: str, value: float) -> bytes:
    tag = re.sub(r"[^-/\w.]", "_", name)
    return _bytes(1, tag.encode()) + b"\x15" + struct.pack("<f", value)


def _record(event: bytes) -> bytes:
    """TFRecord's frame: the length, its checksum, the message, its checksum."""
    length = struct.pack("<Q", len(event))
    return length + _checksum(length) + event + _checksum(event)


# Protobuf: a field begins with its number * 8 + its kind: 0 varint, 1 double, 2 bytes, 5 float.
def _double(field: int, value: float) -> bytes:
    return _varint(8 * field + 1) + struct.pack("<d", value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(8 * field + 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    """Seven bits per byte, the lowest first; the eighth bit says that more follow."""
    digits = []
    while value > 127:
        digits.append(value % 128 + 128)
        value //= 128
    return bytes([*digits, value])


def _crc_table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [value >> 1 ^ (0x82F63B78 if value & 1 else 0) for value in table]
    return table


_CRC32C = _crc_table()


def _checksum(data: bytes) -> bytes:
    """CRC-32C (Castagnoli), rotated and shifted as TFRecord has it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC32C[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
