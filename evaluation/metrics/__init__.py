"""Every metric there is, made for the backbones at hand: an explicit list, in the order of the report."""

from collections.abc import Sequence

from longtake.evaluation.backbones import Backbones, classical_backbones
from longtake.evaluation.metric import Metric
from longtake.evaluation.metrics.course import COLOUR, FLICKER, SEAMS, SHOTS, SPECTRUM, TrackMetric
from longtake.evaluation.metrics.judge import JudgeMetric
from longtake.evaluation.metrics.motion import REPETITION, STILLNESS, FlowMetric
from longtake.evaluation.metrics.stills import StillsMetric
from longtake.evaluation.metrics.vbench import vbench_metrics

GROUPS = ("vbench", "long", "weight_free", "judge")
"""``vbench``: whole videos; ``long``: clips of two seconds (VBench-Long); ``weight_free``: ours; ``judge``: the mini
model's judge."""
COURSE = (STILLNESS, REPETITION, SHOTS, FLICKER, COLOUR, SEAMS, SPECTRUM)


def make_metrics(backbones: Backbones, *, groups: Sequence[str] = GROUPS) -> tuple[list[Metric], dict[str, str]]:
    """Make the metrics of some of :data:`GROUPS`; one whose backbone is missing is skipped.

    Returns:
        The metrics, and {name: why it is not computed} of those that could not be made.
    """
    for group in groups:
        if group not in GROUPS:
            raise ValueError(f"unknown group of metrics {group!r}; known: {', '.join(GROUPS)}.")
    metrics, skipped = vbench_metrics(backbones, short="vbench" in groups, long="long" in groups)
    if "weight_free" in groups:
        metrics.extend([TrackMetric(COURSE), StillsMetric()])
        # Flow needs no network; the metric's name says which one it was.
        metrics.append(FlowMetric(backbones.get("raft") or classical_backbones().found["raft"]))
    if "judge" in groups:
        metrics.append(JudgeMetric())
    return metrics, skipped
