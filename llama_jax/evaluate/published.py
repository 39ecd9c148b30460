"""The published results of the LLaMA paper, from ``published.toml``."""

import functools
import tomllib
from pathlib import Path
from typing import NamedTuple

SOURCE = "arXiv:2302.13971"


class PublishedTable(NamedTuple):
    """One table of the paper. Its items are what is measured: columns, or rows if
    ``models_in_columns``."""

    number: int
    set: str
    """the task set, as in :class:`llama_jax.evaluate.paper_task.PaperTask`"""
    title: str
    short: str
    """beginning of an item's name outside the table"""
    rows: list[list[str]]
    """cells, with a header"""
    ours: list[str]
    """the metric of each item, "task" or "task/metric"; "" if no task measures it"""
    models_in_columns: bool
    label_columns: int
    """columns before the first model, or item"""
    decimals: int
    """1: the values are percentages; else fractions"""

    @property
    def items(self) -> list[str]:
        """Names of the items, as printed."""
        if self.models_in_columns:
            return [row[0] for row in self.rows[1:]]
        return self.rows[0][1:]

    @property
    def values(self) -> dict[str, dict[str, float]]:
        """Published values by model and item, without those that the paper does not give."""
        rows = self.rows
        if self.models_in_columns:
            rows = [list(column) for column in zip(*rows, strict=True)]
        header, *models = [rows[0], *rows[self.label_columns :]]
        return {
            name: {
                item: float(cell.rstrip("*"))
                for item, cell in zip(header[1:], cells, strict=True)
                if cell != "-"
            }
            for name, *cells in models
        }


@functools.cache
def published_tables() -> list[PublishedTable]:
    """All tables, in the order of the report."""
    text = Path(__file__).with_name("published.toml").read_text(encoding="utf-8")
    return [_table(**table) for table in tomllib.loads(text)["table"]]


def _table(
    *, number: int, set: str, title: str, text: str, ours: str | list[str], short: str = "",
    models_in_columns: bool = False, label_columns: int = 1, decimals: int = 1,
) -> PublishedTable:  # fmt: skip
    rows = [[cell.strip() for cell in line.split("|")] for line in text.strip("\n").splitlines()]
    table = PublishedTable(
        number, set, title, short, rows, [], models_in_columns, label_columns, decimals
    )
    names = [f"{ours}/{item}" for item in table.items] if isinstance(ours, str) else ours
    return table._replace(ours=names)
