"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table, with a line break behind each line.

    Args:
        heads: heads of the columns.
        rows: cells of each row, one for each head.
    """
    lines = [_line(heads), f"|{'---|' * len(heads)}"]
    for cells in rows:
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[object]) -> str:
    return "|" + "|".join(f" {cell} " if cell != "" else " " for cell in cells) + "|"
