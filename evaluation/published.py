"""Numbers that others have published, each with where it was read and under which protocol: context, not targets."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from longtake.configs.fields import did_you_mean
from longtake.evaluation.scores import QUALITY, SEMANTIC

SCHEMA = 1
TAGS = {
    "V": "read in a primary text",
    "S": "read in notes on the text",
    "S+": "read in notes, and consistent with the official formula",
    "D": "derived from printed numbers with the official formula",
    "R": "run here",
}
"""{tag: what it says about a number}."""
COLUMNS = {
    **{name: f"VBench {name.replace('_', ' ')}, %" for name in {**QUALITY, **SEMANTIC}},
    "quality7": "VBench Quality over seven dimensions, %",
    "quality6_long": "Quality without temporal flickering, %",
    "semantic": "VBench Semantic, %",
    "total": "VBench Total, %",
    "overall": "a total of unknown formula, %",
    "average": "an average of unknown members, %",
    "consistency": "an average of consistencies, %",
    "temporal_consistency": "as the abstract calls it, %",
    "dino": "DINO consistency, %",
    "viclip_per_segment": "ViCLIP cosine of each segment and its prompt, x100",
    **{f"clip_{start}_{start + 10}s": f"CLIP score of {start} to {start + 10} s, x100" for start in range(0, 60, 10)},
    "visual_stability": "a language model's rating, out of 100",
    "quality_drift": "difference of imaging quality between start and end, x100",
    "relative_drift": "relative drift, %",
    "drift": "a drift of unknown definition",
    "fps_h100": "frames per second on an H100",
}
"""{column: what it is and its unit}."""
_TABLE_KEYS = {"id", "source", "protocol", "seconds", "tag", "note", "columns", "derived_columns", "rows"}


@dataclass(frozen=True, kw_only=True)
class Number:
    """A printed number."""

    value: float
    tag: str  # key of :data:`TAGS`: origin of the number


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model in one table; ``seconds`` is the length of its videos, and ``numbers`` lack what is not printed."""

    table: str
    model: str
    source: str
    protocol: str
    note: str
    seconds: float | None
    numbers: Mapping[str, Number]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "numbers": {name: vars(number) for name, number in self.numbers.items()}}


def load_published(path: Path | None = None) -> list[Row]:
    """Read the rows of all tables of a YAML file of the bundled one's form, or of the bundled one."""
    path = Path(__file__).with_name("published.yaml") if path is None else path
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read published numbers from {path}: {error}") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or not isinstance(content.get("tables"), list):
        raise ValueError(f"{path} must hold 'schema: {SCHEMA}' and a list of 'tables'.")
    rows = [row for table in content["tables"] for row in _table_rows(table, path)]
    counts = Counter((row.table, row.model) for row in rows)
    if repeated := next((name for name, count in counts.items() if count > 1), None):
        raise ValueError(f"{path}: {repeated[1]!r} stands twice in table {repeated[0]!r}.")
    return rows


def find_rows(rows: Sequence[Row], *, seconds: float) -> list[Row]:
    """Rows of videos about as long: within a fifth."""
    return [row for row in rows if row.seconds is not None and abs(row.seconds - seconds) <= 0.2 * seconds]


def _table_rows(table: Any, path: Path) -> list[Row]:
    if not isinstance(table, dict) or not isinstance(table.get("id"), str):
        raise ValueError(f"{path}: every table needs an id, this one has none: {str(table)[:80]}")
    where = f"{path}, table {table['id']!r}"
    missing = _TABLE_KEYS - {"note", "derived_columns"} - table.keys()
    if missing or table.keys() - _TABLE_KEYS:
        raise ValueError(f"{where}: missing {sorted(missing)}, unknown {sorted(table.keys() - _TABLE_KEYS)}.")
    columns, derived = table["columns"], table.get("derived_columns", [])
    for column in [*columns, *derived]:
        if column not in COLUMNS:
            raise ValueError(f"{where}: unknown column {column!r}.{did_you_mean(column, COLUMNS)}")
    seconds = table["seconds"]
    if seconds is not None and not (isinstance(seconds, int | float) and seconds > 0):
        raise ValueError(f"{where}: seconds={seconds!r} must be above 0, or null if unknown.")
    if not table["rows"] or not isinstance(table["rows"], dict):
        raise ValueError(f"{where}: rows must map each model to its numbers.")
    return [_row(table, str(model), content, f"{where}, {model!r}") for model, content in table["rows"].items()]


def _row(table: Mapping[str, Any], model: str, content: Any, where: str) -> Row:
    own = content if isinstance(content, dict) else {"values": content}
    values, columns = own.get("values"), table["columns"]
    if own.keys() - {"values", "tag", "note"} or not isinstance(values, list) or len(values) != len(columns):
        raise ValueError(f"{where}: needs {len(columns)} values, one per column, and at most a tag and a note beside.")
    tag = own.get("tag", table["tag"])
    if tag not in TAGS:
        raise ValueError(f"{where}: unknown tag {tag!r}; known: {', '.join(TAGS)}.")
    numbers = {}
    for column, value in zip(columns, values, strict=True):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise ValueError(f"{where}: {column}={value!r} is no number; use null for what is not printed.")
        numbers[column] = Number(value=float(value), tag="D" if column in table.get("derived_columns", []) else tag)
    return Row(
        table=table["id"],
        model=model,
        source=table["source"],
        protocol=table["protocol"],
        note="; ".join(text for text in (table.get("note", ""), own.get("note", "")) if text),
        seconds=None if table["seconds"] is None else float(table["seconds"]),
        numbers=numbers,
    )
