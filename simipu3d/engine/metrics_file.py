"""metrics.csv of a run: appended while it runs, cut to the checkpoint when it is resumed."""

import csv
import io
import os
from pathlib import Path
from typing import Any

from simipu3d.engine.disk import cannot_write, write_whole
from simipu3d.errors import UserError


class MetricsFile:
    """metrics.csv: a row a logging step, appended; a new column rewrites the file.

    Args:
        path: the file.
        keep_until: rows of later steps are cut (None: the file starts empty).

    Raises:
        UserError: what is there is no such file, or cannot be written.
    """

    def __init__(self, path: Path, keep_until: int | None):
        self.path = path
        rows = [] if keep_until is None else read_rows(path)
        self._write([row for row in rows if int(row["step"]) <= (keep_until or 0)])

    def _write(self, rows: list[dict[str, Any]]) -> None:
        self.columns = list(dict.fromkeys(key for row in rows for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\r\n")
        if self.columns:
            writer.writeheader()
        writer.writerows(rows)
        write_whole(self.path, text.getvalue())

    def append(self, row: dict[str, Any]) -> None:
        """Add a row at the end."""
        if not set(row) <= set(self.columns):
            self._write([*read_rows(self.path), row])
            return
        before = None
        try:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                before = file.tell()
                csv.DictWriter(file, self.columns).writerow(row)
        except OSError as error:
            if before is not None:
                os.truncate(self.path, before)  # no half row: shrinking needs no space
            raise cannot_write(self.path, error) from error


def read_rows(path: Path) -> list[dict[str, str]]:
    """The whole rows of a metrics.csv; a last one that was cut short is left out. No file has none.

    Raises:
        UserError: it is no such file.
    """
    if not path.exists():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if None not in row.values() and None not in row]
        rows = [row for row in rows if row["step"]]
        for row in rows:
            int(row["step"])
    except (KeyError, ValueError, csv.Error, OSError) as error:
        raise UserError(
            f"{path}: not the metrics.csv of a run ({' '.join(str(error).split())}); mend it, or move it away: the run goes on "
            "without its earlier rows"
        ) from error
    return rows
