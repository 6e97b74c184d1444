"""Numbers and tables in words, for people at a terminal; and tables as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from itertools import groupby, zip_longest
from textwrap import wrap
from typing import Any

import numpy as np
from tabulate import tabulate

COLUMNS = 120  # of a terminal, at least
_LEAST_WIDTH = 9  # of a column of words


def counted(count: int, noun: str) -> str:
    """`1, "episode"` → "1 episode"; `1200, "episode"` → "1,200 episodes"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def plus_minus(mean: float, spread: float, digits: int = 1) -> str:
    """ "852.3 ± 4.1", or "852.3" where the spread is not known (nan)."""
    shown = f"{mean:.{digits}f}"
    return shown if math.isnan(spread) else f"{shown} ± {spread:.{digits}f}"


def mean_and_std(values: Sequence[float], digits: int = 1) -> str:
    """Mean ± population standard deviation; of one value, the value."""
    return plus_minus(
        float(np.mean(values)), float(np.std(values)) if len(values) > 1 else math.nan, digits
    )


def table(rows: Iterable[Iterable[Any]], names: Sequence[str]) -> str:
    """Rows under the names of their columns as Markdown, every cell as it is."""
    return tabulate(rows, names, "pipe", disable_numparse=True)


def csv_text(rows: Iterable[Iterable[Any]], names: Iterable[str]) -> str:
    """Rows under the names of their columns as CSV; None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(rows)
    return text.getvalue()


def narrowed(text: str, columns: int = COLUMNS) -> str:
    """Markdown whose tables are broken into lines within their cells where they are too wide."""
    parts = []
    for of_table, lines in groupby(text.split("\n"), lambda line: line.startswith("|")):
        block = list(lines)
        if of_table and max(map(len, block)) > columns:
            block = [_narrow_table(block, columns)]
        parts += block
    return "\n".join(parts)


def _narrow_table(lines: list[str], columns: int) -> str:
    """A pipe table whose second line is its rule."""
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    cells = list(zip(head, *rows, strict=True))
    widths = [max(map(len, column)) for column in cells]
    words = [max(len(word) for cell in column for word in [*cell.split(), " "]) for column in cells]
    room = columns - 3 * len(widths) - 1  # without the rules
    # Whole words, if that is enough; then parts of words, then of numbers.
    texts = [
        _LEAST_WIDTH if any(map(str.isalpha, "".join(column[1:]))) else word
        for column, word in zip(cells, words, strict=True)
    ]
    for least in (words, texts, [1] * len(widths)):
        while sum(widths) > room:
            able = [i for i, few in enumerate(least) if widths[i] > few]
            if not able:
                break
            widths[max(able, key=widths.__getitem__)] -= 1
    rule = f"|{'|'.join('-' * (width + 2) for width in widths)}|"
    head, *rows = (_broken(row, widths) for row in (head, *rows))
    return "\n".join([*head, rule, *(line for row in rows for line in row)])


def _broken(row: list[str], widths: list[int]) -> list[str]:
    """The lines of a row whose cells are as wide as that."""
    cells = [wrap(cell, width) for cell, width in zip(row, widths, strict=True)]
    return [
        "| " + " | ".join(f"{part:<{w}}" for part, w in zip(line, widths, strict=True)) + " |"
        for line in zip_longest(*cells, fillvalue="")
    ]


def folder_name(task: str) -> str:
    """A task's name as that of a folder."""
    return task.replace(":", "-").replace("/", "-")
