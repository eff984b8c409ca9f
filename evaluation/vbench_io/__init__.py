"""To the official VBench and back: videos in the layout it expects, and its results as metrics of a run."""

from longtake.evaluation.vbench_io.export import Export, export_custom, export_long, export_standard
from longtake.evaluation.vbench_io.merging import merge_imported
from longtake.evaluation.vbench_io.parsing import Imported, import_results

__all__ = ["Export", "Imported", "export_custom", "export_long", "export_standard", "import_results", "merge_imported"]
