"""What a run left in its folder, read again."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

from fastresnet.training.loggers import Row
from pipelines.errors import DataError


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """A run, finished or not."""

    folder: Path
    rows: list[Row]
    """metrics.csv, a line for each epoch."""
    summary: dict[str, Any] | None
    """summary.json; None while the run is not finished."""

    @property
    def name(self) -> str:
        return self.folder.absolute().name

    @property
    def evaluated_on(self) -> str:
        """The split measured after every epoch, `test` or `val`."""
        return "val" if "val_loss" in self.rows[0] else "test"


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises `DataError` where it is none, has no finished epoch, or is damaged."""
    metrics = folder / "metrics.csv"
    if not metrics.exists():
        raise DataError(f"{folder} holds no metrics.csv: it is no run folder, or no epoch of the run is finished.")
    try:
        with open(metrics, newline="", encoding="utf-8") as file:
            rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
        evaluated_on = {"val", "test"} & {name.partition("_")[0] for name in rows[0]}
        needed = {"epoch", "step", "lr", *(f"{split}_{what}" for split in ("train", *evaluated_on) for what in
                                           ("loss", "accuracy"))}  # fmt: skip
        if not evaluated_on or not needed <= rows[0].keys():
            raise ValueError("columns are missing")
    except (ValueError, TypeError, AttributeError, IndexError, csv.Error) as error:
        raise DataError(f"{metrics} is damaged: {error}.") from None
    return Run(folder, rows, _read_summary(folder / "summary.json"))


def _read_summary(path: Path) -> dict[str, Any] | None:
    try:
        summary = json.loads(path.read_bytes())
        if summary["schema"] != 1:
            raise ValueError(f"schema {summary['schema']}")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}.") from None
    return summary
