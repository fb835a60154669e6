"""Console of this program: every line and table that rich prints goes through it."""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from fastresnet.text import for_terminal

_COLUMN_WIDTH = 8  # characters, borders included: a column can be folded to that and no further
_BORDER = 2
_UNLIMITED = 100_000


class PlainConsole(Console):
    """Console that prints a string as it is: it interprets no markup and no codes of emoji, and highlights nothing.

    Characters that are not printable become escapes.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:  # of a line, a title or a cell
        return super().render_str(for_terminal(text), **settings)

    def print_table(self, table: Table) -> None:
        """Print `table`, which is folded to the width of a terminal and never cut. A pipe or a file has no width."""
        if self.is_terminal or "COLUMNS" in os.environ:
            self.width = max(self.width, _COLUMN_WIDTH * len(table.columns))
        else:
            self.width = _UNLIMITED
        fits = sum(map(self._least_width, table.columns)) <= self.width
        for column in table.columns:
            column.overflow, column.no_wrap = "fold", column.no_wrap and fits
        self.print(table)

    def _least_width(self, column: Column) -> int:
        if not column.no_wrap:
            return _COLUMN_WIDTH
        return max(self.measure(cell).maximum for cell in (column.header, *column.cells)) + _BORDER
