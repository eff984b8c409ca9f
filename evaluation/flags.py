"""Flags: what is wrong with a video that a mean does not show, from the scores that were measured on it.

Each flag has one measure behind it, and a threshold between what healthy videos score (true scenes of the bundled
world, moving shapes over texture, with and without grain) and what the fault scores at its mildest worth reporting.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longtake.evaluation.metric import Score

STATIC_SHARE = 0.98
"""Of the video's quarter seconds, which leaves room for a hiccup; or every frame looks like the last. True scenes in
which objects hide reach 0.1."""
FROZEN_SECONDS = 1.75
"""Objects of true scenes hide behind their pillar for up to 1.6."""
FROZEN_OVER_REST = 1.5
"""A tail is longer than any rest before it by this factor: objects may be out of view for a while now and then."""
LOOP_SHARE = 0.25
"""Of the video; a loop is followed for two periods before it scores at all."""
LOOP_MARGIN_S = 0.25
PERIOD_TOLERANCE = 0.03
FLICKER_LEVELS = 1.0
"""Grey levels, in some two-second window: 0.4 % of full brightness. Moving scenes stay under 0.1, what the mini model
makes of them and pictures of pure noise under 0.6."""
DRIFT_LEVELS = 12.0
"""Grey levels within a shot: clearly seen side by side. True scenes stay under 1, moving shapes under 3."""
DRIFT_STEADINESS = 0.7
"""Drifts of any course reach 0.95; the colours of what comes and goes may be far apart, but stay under 0.6."""
SEAM_RATIO = 2.0
"""The mini model's blocks give 0.9 to 1.1."""


@dataclass(frozen=True, kw_only=True)
class _Flag:
    """Something that is wrong with a video.

    Attributes:
        kind: ``static``, ``frozen_tail``, ``loop``, ``cut``, ``flicker``, ``colour_drift`` or ``seams``.
        start_s: From when, in seconds.
        end_s: Until when.
        message: One sentence for the report.
    """

    kind: str
    start_s: float
    end_s: float
    message: str


def flags(scores: Mapping[str, Score]) -> list[_Flag]:
    """Find what is wrong with a video.

    Args:
        scores: {name: score} of the video; a flag whose measure is missing or has no value is not raised.

    Returns:
        In the order of :data:`KINDS`; a video may have several cuts.
    """
    found: list[_Flag] = []
    for name, judge in KINDS.values():
        score = scores.get(name)
        if score is not None and score.value is not None:
            found.extend(judge(score.value, score.details, scores))
    return found


_Details = Mapping[str, Any]
_Scores = Mapping[str, Score]


def _static(value: float, details: _Details, scores: _Scores) -> list[_Flag]:
    if not details.get("is_one_picture") and (value < STATIC_SHARE or _value(scores, "proxy/frozen_tail_s") > 0.0):
        return []
    flicker = scores.get("proxy/flicker_excess")
    if flicker is not None and flicker.value is not None and flicker.details["worst_window"] >= FLICKER_LEVELS:
        return []  # The picture does change, and the other flag says how.
    return [_Flag(kind="static", start_s=0.0, end_s=details["seconds"], message="nothing moves in the whole video")]


def _frozen_tail(value: float, details: _Details, scores: _Scores) -> list[_Flag]:
    if value < max(FROZEN_SECONDS, FROZEN_OVER_REST * details["longest_rest_before_s"]):
        return []
    message = f"stands still for the last {value:.1f} s, after it moved"
    return [_Flag(kind="frozen_tail", start_s=details["start_s"], end_s=details["end_s"], message=message)]


def _loop(value: float, details: _Details, scores: _Scores) -> list[_Flag]:
    period = details["period_s"]
    if value < LOOP_SHARE or period is None or _repeats_truly(period, scores):
        return []
    message = f"plays the same {period:.2f} s again and again"
    return [_Flag(kind="loop", start_s=details["start_s"], end_s=details["end_s"], message=message)]


def _repeats_truly(period: float, scores: _Scores) -> bool:
    """Whether the prompt itself asks for what repeats so: the bundled world's scenes are periodic."""
    judged = scores.get("judge/motion_magnitude")
    true_periods = judged.details.get("scene_periods_s", ()) if judged is not None else ()
    plays = [period / true_period for true_period in true_periods]
    return any(round(ratio) >= 1 and abs(ratio / round(ratio) - 1.0) < PERIOD_TOLERANCE for ratio in plays)


def _cut(value: float, details: _Details, scores: _Scores) -> list[_Flag]:
    # Where a loop begins again it jumps, which is the loop's doing.
    loop = scores.get("proxy/loop_share")
    if loop is not None and loop.value and loop.details["period_s"]:
        times = [time for time in details["times_s"] if not _begins_again(time, loop.details, details["times_s"])]
    else:
        times = details["times_s"]
    return [_Flag(kind="cut", start_s=time, end_s=time, message=f"cuts at {time:.2f} s") for time in times]


def _begins_again(time: float, loop: _Details, cuts: Sequence[float]) -> bool:
    """Whether a cut comes after a loop's first play, or once more a period later."""
    period = loop["period_s"]
    is_repeated = any(abs(other - time - period) <= LOOP_MARGIN_S for other in cuts)
    first = loop["start_s"] if is_repeated else loop["start_s"] + period - LOOP_MARGIN_S
    return first <= time <= loop["end_s"]


def _flicker(value: float, details: _Details, scores: _Scores) -> list[_Flag]:
    worst = details["worst_window"]
    if worst < FLICKER_LEVELS:
        return []
    message = f"brightness of the whole picture flickers by {worst:.1f} grey levels"
    return [_Flag(kind="flicker", start_s=details["worst_start_s"], end_s=details["worst_end_s"], message=message)]


def _colour_drift(value: float, details: _Details, scores: _Scores) -> list[_Flag]:
    trend = details["trend"]
    if not trend or abs(trend["change"]) < DRIFT_LEVELS or trend["steadiness"] < DRIFT_STEADINESS:
        return []
    message = f"{trend['feature']} drifts by {trend['change']:+.0f} grey levels"
    return [_Flag(kind="colour_drift", start_s=trend["start_s"], end_s=trend["end_s"], message=message)]


def _seams(value: float, details: _Details, scores: _Scores) -> list[_Flag]:
    if value < SEAM_RATIO:
        return []
    message = f"jumps {value:.1f} times as far where blocks begin as elsewhere"
    return [_Flag(kind="seams", start_s=details["first_s"], end_s=details["last_s"], message=message)]


def _value(scores: _Scores, name: str) -> float:
    score = scores.get(name)
    return score.value if score is not None and score.value is not None else 0.0


KINDS: Mapping[str, tuple[str, Callable[[float, _Details, _Scores], list[_Flag]]]] = {
    "static": ("proxy/static_share", _static),
    "frozen_tail": ("proxy/frozen_tail_s", _frozen_tail),
    "loop": ("proxy/loop_share", _loop),
    "cut": ("proxy/cuts", _cut),
    "flicker": ("proxy/flicker_excess", _flicker),
    "colour_drift": ("proxy/colour_drift", _colour_drift),
    "seams": ("proxy/chunk_seam_ratio", _seams),
}
"""{kind: (measure behind it, rule)}."""
