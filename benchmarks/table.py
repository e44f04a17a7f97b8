"""A table of results that prints itself and writes itself down."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich
import rich.box
import rich.table


@dataclasses.dataclass(frozen=True)
class Table:
    """A title, column headings, and rows of text whose first cell is the row's name."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def show(self) -> None:
        table = rich.table.Table(
            title=self.title, box=rich.box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False
        )
        table.add_column(self.columns[0], no_wrap=True)
        for column in self.columns[1:]:
            table.add_column(column, justify="right")
        for row in self.rows:
            table.add_row(*row)
        rich.print(table)

    def markdown(self) -> str:
        rule = ["---", *["---:"] * (len(self.columns) - 1)]
        lines = ["| " + " | ".join(cells) + " |" for cells in (self.columns, rule, *self.rows)]
        return "\n".join([f"**{self.title}**", "", *lines, ""])


def write(path: Path, tables: Sequence[Table], data: dict[str, Any]) -> None:
    """The tables to a ``.md`` file, or the unrounded data to a ``.json`` file."""
    if path.suffix == ".md":
        path.write_text("\n".join(table.markdown() for table in tables))
    elif path.suffix == ".json":
        path.write_text(json.dumps(data, indent=2) + "\n")
    else:
        raise ValueError(f"{path}: write to a .md or a .json file")
