"""What the official VBench expects where: dimensions, folders, file names. Commit 45e79ec of Vchitect/VBench."""

from collections.abc import Sequence

from longtake.configs.fields import did_you_mean
from longtake.evaluation.scores import QUALITY, SEMANTIC

COMMIT = "45e79ec14e69a2187202c675d2dbce1a71843d53"
DIMENSIONS = (*QUALITY, *SEMANTIC)
"""All sixteen, as the official tool spells them."""
CUSTOM_DIMENSIONS = (*QUALITY, "overall_consistency")
"""What is scored on videos of one's own: the README's six, and two more that run though it does not list them."""
PROMPT_DIMENSIONS = ("overall_consistency", "temporal_style", "human_action")
"""Run on videos of one's own, and read the prompt."""
LONG_DIMENSIONS = tuple(name for name in QUALITY if name != "temporal_flickering")
"""VBench-Long's on videos of one's own; it would read prompts from folder names, so none that needs a prompt."""
FOLDERS = {
    "background_consistency": "scene",
    "aesthetic_quality": "overall_consistency",
    "imaging_quality": "overall_consistency",
    "motion_smoothness": "subject_consistency",
    "dynamic_degree": "subject_consistency",
}
"""Dimensions that are scored on another dimension's videos; the others have their own name."""
NUM_SAMPLES = 5
MAX_NAME_BYTES = 255
LONG_SECONDS = 5.0
"""VBench's FAQ: VBench below, VBench-Long from here on."""
MAX_CRF = 12
"""Above it the codec shows in flickering and imaging quality; our own default for evaluation."""


def check_dimensions(dimensions: Sequence[str], allowed: Sequence[str], *, mode: str) -> None:
    """Refuse dimensions that a mode of the official tool does not have.

    Raises:
        ValueError: If one is unknown, not of this mode, or given twice, or there is none.
    """
    for name in dimensions:
        if name not in DIMENSIONS:
            raise ValueError(
                f"unknown dimension {name!r}; known: {', '.join(DIMENSIONS)}.{did_you_mean(name, DIMENSIONS)}"
            )
        if name not in allowed:
            raise ValueError(f"dimension {name!r} is not scored in mode {mode}: use {', '.join(allowed)}.")
    if not dimensions or len(set(dimensions)) < len(dimensions):
        raise ValueError(f"dimensions={list(dimensions)}: name one or more, each once.")


def folder_of(dimension: str) -> str:
    """The folder whose videos a dimension is scored on in standard mode."""
    return FOLDERS.get(dimension, dimension)
