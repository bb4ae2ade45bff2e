"""Text files that are whole or as they were, and what can still be read of damaged ones."""

import json
import os
import pathlib
import sys
from typing import Any


def write(path: pathlib.Path, content: str | bytes) -> None:
    """Write a file beside its place and rename it, on disk: a kill leaves the old one or this."""
    scratch = path.with_name(f"{path.name}.tmp")
    with scratch.open("wb") as out:
        out.write(content if isinstance(content, bytes) else content.encode())
        out.flush()
        os.fsync(out.fileno())
    scratch.replace(path)


def write_json(path: pathlib.Path, content: Any) -> None:
    """Write a file of indented JSON."""
    write(path, json.dumps(content, indent=2) + "\n")


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """Read a file that holds a JSON object; ValueError where it does not."""
    try:
        content = json.loads(path.read_bytes().decode())
    except RecursionError as error:
        raise ValueError("it is nested without end") from error
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not an object")
    return content


def read_lines(path: pathlib.Path, needed: str) -> list[dict[str, Any]]:
    """Read a file of one JSON object a line, each with this key; tell of lines that are not.

    A last line that a kill has cut off is left out without a word.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    found, damaged = [], []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line.decode())
            if not isinstance(record, dict) or needed not in record:
                raise ValueError
            found.append(record)
        except (ValueError, RecursionError):
            if number < len(lines):  # the last one is empty, or cut off
                damaged.append(str(number))
    if damaged:
        tell(f"{path}: what is in line {', '.join(damaged)[:80]} cannot be read and is left out")
    return found


def tell(sentence: str) -> None:
    """Say something to the user that is no result."""
    print(sentence, file=sys.stderr)
