"""Tables: as Markdown, as CSV with the raw numbers, as HTML that can be sorted."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Mapping
from dataclasses import dataclass, field

from e2e_sae_plugin.evaluation.estimate import Estimate
from e2e_sae_plugin.report.text import NOT_AVAILABLE, escape_markdown, is_finite, number_text, printable

Cell = str | int | float | Estimate | None
NOTHING = "—"


@dataclass(frozen=True)
class Table:
    """A table of a report.

    Raises:
        ValueError: a row is too short or too long, two columns are called the same, or a format does not fit.
    """

    name: str
    """Stem of its file."""
    title: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    """An `Estimate` is shown as `0.123 [0.110, 0.135]`; None as a dash; nan and infinity as "n/a"."""
    formats: Mapping[str, str] = field(default_factory=dict)
    """Column -> how its numbers are written, such as "{:.3f}" or "{:+.1%}". Others: four significant digits."""

    def __post_init__(self) -> None:
        if len(set(self.columns)) < len(self.columns):
            raise ValueError(f"Table {self.name!r} has columns of the same name: {self.columns}. Rename one.")
        for index, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"Row {index} of table {self.name!r} has {len(row)} cells; expected {len(self.columns)}, one per "
                    f"column: {', '.join(self.columns)}."
                )
        for column, form in self.formats.items():
            if column not in self.columns:
                raise ValueError(
                    f"Table {self.name!r} has a format for {column!r}, but its columns are {self.columns}."
                )
            try:
                form.format(0.5)
            except (ValueError, KeyError, IndexError) as error:
                raise ValueError(
                    f"The format {form!r} of column {column!r} in table {self.name!r} cannot write a number ({error}): "
                    'give one such as "{:.3f}".'
                ) from None

    def text(self, column: str, cell: Cell) -> str:
        """A cell as it is read."""
        if cell is None:
            return NOTHING
        if isinstance(cell, str):
            return cell
        if isinstance(cell, Estimate):
            ends = f"{self._number(column, cell.low)}, {self._number(column, cell.high)}"
            return f"{self._number(column, cell.value)} [{ends}]" if is_finite(cell.value) else NOT_AVAILABLE
        return self._number(column, cell)

    def to_markdown(self) -> str:
        """The table alone, without its title."""
        lines = ["| " + " | ".join(map(escape_markdown, self.columns)) + " |"]
        lines.append("|" + "".join(f" {'---:' if numeric else '---'} |" for numeric in self._numeric()))
        for row in self.rows:
            texts = (escape_markdown(self.text(*pair)) for pair in zip(self.columns, row, strict=True))
            lines.append("| " + " | ".join(texts) + " |")
        return "\n".join(lines) + "\n"

    _repr_markdown_ = to_markdown  # what a notebook shows

    def to_text(self) -> str:
        """The table in columns of a terminal, without its title."""
        cells = [self.columns, *([*map(self.text, self.columns, row)] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        align = [str.rjust if numeric else str.ljust for numeric in self._numeric()]
        lines = ["  ".join(map(lambda put, text, width: put(text, width), align, row, widths)) for row in cells]
        return "\n".join(line.rstrip() for line in [lines[0], "-" * len(lines[0]), *lines[1:]])

    def to_csv(self) -> str:
        """The raw values; a column with estimates becomes three: its name, and that with `_low` and `_high`."""
        file = io.StringIO(newline="")
        writer = csv.writer(file, lineterminator="\n")
        triple = [any(isinstance(row[index], Estimate) for row in self.rows) for index in range(len(self.columns))]
        header: list[str] = []
        for column, is_triple in zip(self.columns, triple, strict=True):
            header += [column, f"{column}_low", f"{column}_high"] if is_triple else [column]
        writer.writerow(header)
        for row in self.rows:
            values: list[str | float | None] = []
            for cell, is_triple in zip(row, triple, strict=True):
                if isinstance(cell, Estimate):
                    values += [cell.value, cell.low, cell.high]
                else:
                    values += [cell, None, None] if is_triple else [cell]
            writer.writerow([_encodable(value) if isinstance(value, str) else value for value in values])
        return file.getvalue()

    def to_html(self) -> str:
        """A `<table>` whose headers are buttons to sort by; report.js makes them work."""
        numeric = self._numeric()
        head = "".join(
            f'<th scope="col"{_class(is_number)}><button type="button" class="sort">{_html(column)}</button></th>'
            for column, is_number in zip(self.columns, numeric, strict=True)
        )
        body = ""
        for row in self.rows:
            cells = ""
            for index, (column, cell) in enumerate(zip(self.columns, row, strict=True)):
                tag = 'th scope="row"' if index == 0 and isinstance(cell, str) else "td"
                cells += (
                    f"<{tag}{_class(numeric[index])}{_sort_value(cell)}>{self._html_text(column, cell)}</{tag[:2]}>"
                )
            body += f"<tr>{cells}</tr>\n"
        caption = f"<caption>{_html(self.title)}</caption>" if self.title else ""
        return f"<table>{caption}\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>"

    def _html_text(self, column: str, cell: Cell) -> str:
        number, bracket, interval = self.text(column, cell).partition(" [")
        if isinstance(cell, Estimate) and bracket:
            return f'{_html(number)} <span class="interval">[{_html(interval)}</span>'
        return _html(self.text(column, cell))

    def _number(self, column: str, value: float) -> str:
        if not is_finite(value):
            return NOT_AVAILABLE
        form = self.formats.get(column)
        return number_text(value) if form is None else form.format(value)

    def _numeric(self) -> list[bool]:
        cells = [[row[index] for row in self.rows] for index in range(len(self.columns))]
        return [bool(column) and not any(isinstance(cell, str) for cell in column) for column in cells]


def _encodable(text: str) -> str:
    """Without halves of surrogate pairs, which no UTF-8 file can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _html(text: str) -> str:
    return html.escape(printable(text))


def _class(is_number: bool) -> str:
    return ' class="number"' if is_number else ""


def _sort_value(cell: Cell) -> str:
    value = cell.value if isinstance(cell, Estimate) else cell
    if isinstance(value, str):
        return ""
    return f' data-value="{float(value)!r}"' if is_finite(value) else ' data-value=""'
