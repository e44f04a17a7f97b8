"""A table of results that prints itself and writes itself down."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich.box
from rich.console import Console
from rich.table import Table as RichTable

# A file or a pipe has no width of its own.
console = Console(width=None if sys.stdout.isatty() else 140)


@dataclasses.dataclass(frozen=True)
class Table:
    """A title, column headings, rows of text whose first cell is the row's name, and notes."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def show(self) -> None:
        table = RichTable(
            title=self.title, box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
        )
        table.add_column(self.columns[0], no_wrap=True)
        for column in self.columns[1:]:
            table.add_column(column, justify="right")
        for row in self.rows:
            table.add_row(*row)
        console.print(table, *self.notes, sep="\n", markup=False)

    def markdown(self) -> str:
        rule = ["---", *["---:"] * (len(self.columns) - 1)]
        lines = ["| " + " | ".join(cells) + " |" for cells in (self.columns, rule, *self.rows)]
        notes = [line for note in self.notes for line in (note, "")]
        return "\n".join([f"**{self.title}**", "", *lines, "", *notes])


def output_path(argument: str) -> Path:
    """The type of a command's ``--output`` argument."""
    path = Path(argument)
    if path.suffix not in (".md", ".json"):
        raise argparse.ArgumentTypeError(f"{argument!r} is not a .md or a .json file")
    return path


def write(path: Path, tables: Sequence[Table], data: dict[str, Any]) -> None:
    """The tables to a ``.md`` file, or the unrounded data to a ``.json`` file."""
    if path.suffix == ".md":
        path.write_text("\n".join(table.markdown() for table in tables))
    else:
        path.write_text(json.dumps(data, indent=2) + "\n")


def save(stem: Path, tables: Sequence[Table], data: dict[str, Any]) -> None:
    """Both, beside each other."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".md", ".json"):
        write(stem.with_suffix(suffix), tables, data)
