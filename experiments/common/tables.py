"""Tables as text: for a terminal, and in Markdown."""

from collections.abc import Sequence


def aligned(table: Sequence[Sequence[str]], words: int = 1) -> str:
    """Lay out a header and rows for a terminal; the first columns are words, the others numbers."""
    return _laid_out(table, [i < words for i in range(len(table[0]))])


def markdown(table: Sequence[Sequence[str]], words: int = 1) -> list[str]:
    """Write a header and rows in Markdown, as lines."""
    rule = ["---" if i < words else "---:" for i in range(len(table[0]))]
    return ["| " + " | ".join(row) + " |" for row in (table[0], rule, *table[1:])]


def cells(records: Sequence[dict]) -> list[list[str]]:
    """Write records as a header and rows, numbers to three digits, a dash for what one lacks."""
    header = list(dict.fromkeys(key for record in records for key in record))
    return [header, *([_cell(record.get(key)) for key in header] for record in records)]


def of_records(records: Sequence[dict]) -> str:
    """Lay out records for a terminal."""
    table = cells(records)
    return _laid_out(
        table, [any(isinstance(record.get(key), str) for record in records) for key in table[0]]
    )


def _laid_out(table: Sequence[Sequence[str]], left: Sequence[bool]) -> str:
    """Pad every column to its widest cell, to the left or to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if is_left else cell.rjust(width)
            for cell, width, is_left in zip(row, widths, left, strict=True)
        ).rstrip()
        for row in table
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _cell(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)
