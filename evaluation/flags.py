"""Flags: what is wrong with a video that a mean does not show, from the scores that were measured on it.

Each flag has one measure behind it, and a threshold between what healthy videos score (true scenes of the bundled
world, moving shapes over texture, with and without grain) and what the fault scores at its mildest worth reporting.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from longtake.evaluation.metric import Score

_STATIC_SHARE = 0.98
"""Of the video's quarter seconds, which leaves room for a hiccup; or every frame looks like the last. True scenes in
which objects hide reach 0.1."""
_FROZEN_SECONDS = 1.75
"""Objects of true scenes hide behind their pillar for up to 1.6."""
_FROZEN_OVER_REST = 1.5
"""A tail is longer than any rest before it by this factor: objects may be out of view for a while now and then."""
_LOOP_SHARE = 0.25
"""Of the video; a loop is followed for two periods before it scores at all."""
_LOOP_MARGIN_S = 0.25
_PERIOD_TOLERANCE = 0.03
_FLICKER_LEVELS = 1.0
"""Grey levels, in some two-second window: 0.4 % of full brightness. Moving scenes stay under 0.1, what the mini model
makes of them and pictures of pure noise under 0.6."""
_DRIFT_LEVELS = 12.0
"""Grey levels within a shot: clearly seen side by side. True scenes stay under 1, moving shapes under 3."""
_DRIFT_STEADINESS = 0.7
"""Drifts of any course reach 0.95; the colours of what comes and goes may be far apart, but stay under 0.6."""
_SEAM_RATIO = 2.0
"""The mini model's blocks give 0.9 to 1.1."""


Stretch = tuple[float, float, str]
"""(start, end, sentence for the report), in seconds."""
_Rule = Callable[[float, Mapping[str, Any], Mapping[str, Score]], Iterator[Stretch]]


class Flag(NamedTuple):
    """Something that is wrong with a video, which a mean does not show; ``kind`` is one of :data:`KINDS`."""

    kind: str
    start_s: float
    end_s: float
    message: str


def flags(scores: Mapping[str, Score]) -> list[Flag]:
    """Find what is wrong with a video by its scores, in the order of :data:`KINDS`; there may be several cuts.

    A flag whose measure is missing or has no value is not raised.
    """
    found: list[Flag] = []
    for kind, (name, rule) in KINDS.items():
        score = scores.get(name)
        if score is not None and score.value is not None:
            found += [Flag(kind, *stretch) for stretch in rule(score.value, score.details, scores)]
    return found


def _static(value: float, details: Mapping[str, Any], scores: Mapping[str, Score]) -> Iterator[Stretch]:
    tail, flicker = (scores.get(f"proxy/{name}") for name in ("frozen_tail_s", "flicker_excess"))
    has_tail = tail is not None and (tail.value or 0.0) > 0.0
    # Where it flickers the picture does change, and the other flag says how.
    flickers = flicker is not None and flicker.value is not None and flicker.details["worst_window"] >= _FLICKER_LEVELS
    if (details.get("is_one_picture") or (value >= _STATIC_SHARE and not has_tail)) and not flickers:
        yield 0.0, details["seconds"], "nothing moves in the whole video"


def _frozen_tail(value: float, details: Mapping[str, Any], scores: Mapping[str, Score]) -> Iterator[Stretch]:
    if value >= max(_FROZEN_SECONDS, _FROZEN_OVER_REST * details["longest_rest_before_s"]):
        yield details["start_s"], details["end_s"], f"stands still for the last {value:.1f} s, after it moved"


def _loop(value: float, details: Mapping[str, Any], scores: Mapping[str, Score]) -> Iterator[Stretch]:
    period = details["period_s"]
    if value >= _LOOP_SHARE and period is not None and not _repeats_truly(period, scores):
        yield details["start_s"], details["end_s"], f"plays the same {period:.2f} s again and again"


def _repeats_truly(period: float, scores: Mapping[str, Score]) -> bool:
    """Whether the prompt itself asks for what repeats so: the bundled world's scenes are periodic."""
    judged = scores.get("judge/motion_magnitude")
    true_periods = judged.details.get("scene_periods_s", ()) if judged is not None else ()
    plays = [period / true_period for true_period in true_periods]
    return any(round(ratio) >= 1 and abs(ratio / round(ratio) - 1.0) < _PERIOD_TOLERANCE for ratio in plays)


def _cut(value: float, details: Mapping[str, Any], scores: Mapping[str, Score]) -> Iterator[Stretch]:
    loop = scores.get("proxy/loop_share")
    loops = loop is not None and loop.value and loop.details["period_s"]
    for time in details["times_s"]:
        # Where a loop begins again it jumps, which is the loop's doing.
        if not (loop is not None and loops and _begins_again(time, loop.details, details["times_s"])):
            yield time, time, f"cuts at {time:.2f} s"


def _begins_again(time: float, loop: Mapping[str, Any], cuts: Sequence[float]) -> bool:
    """Whether a cut comes after a loop's first play, or once more a period later."""
    period = loop["period_s"]
    is_repeated = any(abs(other - time - period) <= _LOOP_MARGIN_S for other in cuts)
    first = loop["start_s"] if is_repeated else loop["start_s"] + period - _LOOP_MARGIN_S
    return first <= time <= loop["end_s"]


def _flicker(value: float, details: Mapping[str, Any], scores: Mapping[str, Score]) -> Iterator[Stretch]:
    worst = details["worst_window"]
    if worst >= _FLICKER_LEVELS:
        message = f"brightness of the whole picture flickers by {worst:.1f} grey levels"
        yield details["worst_start_s"], details["worst_end_s"], message


def _colour_drift(value: float, details: Mapping[str, Any], scores: Mapping[str, Score]) -> Iterator[Stretch]:
    trend = details["trend"]
    if trend and abs(trend["change"]) >= _DRIFT_LEVELS and trend["steadiness"] >= _DRIFT_STEADINESS:
        message = f"{trend['feature']} drifts by {trend['change']:+.0f} grey levels"
        yield trend["start_s"], trend["end_s"], message


def _seams(value: float, details: Mapping[str, Any], scores: Mapping[str, Score]) -> Iterator[Stretch]:
    if value >= _SEAM_RATIO:
        message = f"jumps {value:.1f} times as far where blocks begin as elsewhere"
        yield details["first_s"], details["last_s"], message


KINDS: Mapping[str, tuple[str, _Rule]] = {
    "static": ("proxy/static_share", _static),
    "frozen_tail": ("proxy/frozen_tail_s", _frozen_tail),
    "loop": ("proxy/loop_share", _loop),
    "cut": ("proxy/cuts", _cut),
    "flicker": ("proxy/flicker_excess", _flicker),
    "colour_drift": ("proxy/colour_drift", _colour_drift),
    "seams": ("proxy/chunk_seam_ratio", _seams),
}
"""{kind: (measure behind it, rule)}."""
