"""To the official VBench and back: videos in the layout it expects, and its results as metrics of a run."""

from longtake.evaluation.vbench_io.export import Export, export_custom, export_long, export_standard
from longtake.evaluation.vbench_io.importing import (
    Imported,
    import_results,
    merge_imported,
    official_values,
    read_imported,
    write_imported,
)

__all__ = [
    "Export",
    "Imported",
    "export_custom",
    "export_long",
    "export_standard",
    "import_results",
    "merge_imported",
    "official_values",
    "read_imported",
    "write_imported",
]
