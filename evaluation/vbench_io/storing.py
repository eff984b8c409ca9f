"""Official results kept beside a run's own scores, so that reading the run again merges them."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from longtake.evaluation.records import write_json
from longtake.evaluation.vbench_io.parsing import Entry, Imported

IMPORTED_FILE = "imported.json"


def write_imported(folder: Path, results: Mapping[str, Imported]) -> Path:
    """Keep official results in a run's folder; metrics kept there before stay unless they come again.

    Args:
        folder: Of the run.
        results: Of :func:`longtake.evaluation.vbench_io.import_results`; see that they merge before they are kept.

    Returns:
        The file.

    Raises:
        ValueError: If results kept before cannot be read.
    """
    kept = {**read_imported(folder), **results}
    path = folder / IMPORTED_FILE
    write_json(path, {name: asdict(result) for name, result in kept.items()})
    return path


def read_imported(folder: Path) -> dict[str, Imported]:
    """Official results that were kept in a run's folder, {metric name: result}; none if there are none.

    Raises:
        ValueError: If they cannot be read.
    """
    path = folder / IMPORTED_FILE
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            name: Imported(
                **{
                    **values,
                    "entries": tuple(Entry(**entry) for entry in values["entries"]),
                    "notes": tuple(values["notes"]),
                }
            )
            for name, values in content.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"cannot read {path}: {error!r}: delete it and import again.") from error
