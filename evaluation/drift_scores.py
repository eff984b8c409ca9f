"""How a measure changes over a video: the field's drift numbers, each from the curve of the measure's windows.

With M over frames [a, b) the mean of the windows there, each weighed by how much of it lies inside:

* ``first5``, ``last5``: M of the first and of the last five seconds; ``delta5`` = first5 - last5, signed, as
  Forcing-KV's script has it (which measures two clips cut out of the video, not windows); ``abs`` = |delta5|.
* ``helios15``: |M(first 15 % of the frames) - M(last 15 %)|, as Helios' evaluation has it.
* ``vde_linear``, ``vde_log``: BlockVid's video drift error over ten equal chunks, sum of w_i |m_i - m_1| / m_1 for
  i = 2..10 with w_i = 10 - i + 1 or its logarithm: the *early* chunks weigh most.
* ``slope_per_minute``: least-squares line through the windows.
* ``last_over_first``: last5 / first5; for motion, how much of it is left.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import log

import numpy as np

from longtake.evaluation.metric import MetricSpec, Score, Window

SPAN_SECONDS = 5.0
MIN_SECONDS = 2 * SPAN_SECONDS
HELIOS_SHARE = 0.15
NUM_CHUNKS = 10


class _NoValueError(Exception):
    """Why a curve has no such number; its text is the score's reason."""


@dataclass(frozen=True, kw_only=True)
class _Curve:
    """Windows with a value, in order."""

    windows: tuple[Window, ...]
    num_frames: int
    fps: float

    def mean(self, start: float, end: float) -> float:
        total = weight = 0.0
        for window in self.windows:
            inside = min(end, window.start_frame + window.num_frames) - max(start, window.start_frame)
            if inside > 0:
                total, weight = total + inside * window.value, weight + inside
        if not weight:
            raise _NoValueError(f"no value between {start / self.fps:g} s and {end / self.fps:g} s")
        return total / weight

    @property
    def first(self) -> float:
        return self.mean(0, SPAN_SECONDS * self.fps)

    @property
    def last(self) -> float:
        return self.mean(self.num_frames - SPAN_SECONDS * self.fps, self.num_frames)


def _helios(curve: _Curve) -> float:
    span = HELIOS_SHARE * curve.num_frames
    return abs(curve.mean(0, span) - curve.mean(curve.num_frames - span, curve.num_frames))


def _vde(curve: _Curve, weigh: Callable[[float], float]) -> float:
    edges = np.linspace(0, curve.num_frames, NUM_CHUNKS + 1).tolist()
    means = [curve.mean(start, end) for start, end in zip(edges, edges[1:], strict=False)]
    if means[0] <= 0:
        raise _NoValueError(f"relative to the first tenth, which is {means[0]:g}: not above 0")
    return sum(weigh(NUM_CHUNKS - i) * abs(means[i] - means[0]) for i in range(1, NUM_CHUNKS)) / means[0]


def _slope(curve: _Curve) -> float:
    if len(curve.windows) < 2:
        raise _NoValueError("a line needs two windows with a value")
    minutes = np.array([(w.start_frame + w.num_frames / 2) / curve.fps / 60 for w in curve.windows])
    values = np.array([w.value for w in curve.windows])
    centred = minutes - minutes.mean()
    return float(centred @ (values - values.mean()) / (centred @ centred))


def _ratio(curve: _Curve) -> float:
    if curve.first <= 0:
        raise _NoValueError(f"relative to the first {SPAN_SECONDS:g} s, which are {curve.first:g}: not above 0")
    return curve.last / curve.first


@dataclass(frozen=True, kw_only=True)
class _Scalar:
    """One number of a curve.

    ``better``: 1 if more is better where more of the measure is, -1 if less is, 0 if less is always better.
    """

    compute: Callable[[_Curve], float]
    better: int
    description: str
    is_relative: bool = False


SCALARS: dict[str, _Scalar] = {
    "first5": _Scalar(compute=lambda c: c.first, better=1, description="mean of the first 5 s"),
    "last5": _Scalar(compute=lambda c: c.last, better=1, description="mean of the last 5 s"),
    "delta5": _Scalar(compute=lambda c: c.first - c.last, better=-1, description="first 5 s less last 5 s, signed"),
    "abs": _Scalar(compute=lambda c: abs(c.first - c.last), better=0, description="|first 5 s - last 5 s|"),
    "helios15": _Scalar(compute=_helios, better=0, description="|first 15 % of the frames - last 15 %|"),
    "vde_linear": _Scalar(
        compute=lambda c: _vde(c, float),
        better=0,
        description="change of ten chunks relative to the first, linear weights, early ones most",
        is_relative=True,
    ),
    "vde_log": _Scalar(
        compute=lambda c: _vde(c, log),
        better=0,
        description="change of ten chunks relative to the first, logarithmic weights, early ones most",
        is_relative=True,
    ),
    "slope_per_minute": _Scalar(
        compute=_slope, better=1, description="least-squares slope over the windows, per minute"
    ),
    "last_over_first": _Scalar(compute=_ratio, better=1, description="last 5 s over first 5 s", is_relative=True),
}
"""{name: how it is made of a curve}; the last part of a drift metric's name."""
_SOURCES = {"delta5": "Forcing-KV", "helios15": "Helios", "vde_linear": "BlockVid", "vde_log": "BlockVid"}


def _drift_name(metric: str, scalar: str) -> str:
    """``drift/METRIC/SCALAR``, the metric with its prefix."""
    return f"drift/{metric}/{scalar}"


def drift_specs(spec: MetricSpec) -> tuple[MetricSpec, ...]:
    """What the drift numbers of a measure mean.

    Args:
        spec: Of a measure that gives windows.

    Returns:
        One per scalar, in the order of :data:`SCALARS`; none for a measure that is a drift or of a set itself.
    """
    if spec.name.startswith(("drift/", "set/")):
        return ()
    return tuple(_spec(spec, name, scalar) for name, scalar in SCALARS.items())


def _spec(spec: MetricSpec, name: str, scalar: _Scalar) -> MetricSpec:
    higher = None if spec.higher_is_better is None else spec.higher_is_better == (scalar.better == 1)
    return replace(
        spec,
        name=_drift_name(spec.name, name),
        higher_is_better=higher if scalar.better else False,
        unit="" if scalar.is_relative else spec.unit,
        range=spec.range if name in ("first5", "last5") else (None, None),
        formula=_SOURCES.get(name, "ours"),
        grouping="video",
        scale=1.0 if scalar.is_relative else spec.scale,
        description=f"{scalar.description}, of the curve of {spec.name}.",
    )


def drift_scores(spec: MetricSpec, score: Score, fps: float) -> dict[str, Score]:
    """The drift numbers of one measure on one video.

    Args:
        spec: Of the measure.
        score: Its score, with windows; windows without a value are left out.
        fps: Of the video.

    Returns:
        {name: score}, one for every one of :func:`drift_specs`; none has a value where the video is under ten seconds,
        the measure has no curve or no value, or the number is not defined for it.

    Raises:
        ValueError: If ``fps`` is not above 0.
    """
    if not fps > 0:
        raise ValueError(f"fps={fps} of a video must be above 0.")
    windows = tuple(window for window in score.windows if window.value is not None)
    num_frames = score.windows[-1].start_frame + score.windows[-1].num_frames if score.windows else 0
    curve = _Curve(windows=windows, num_frames=num_frames, fps=fps)
    refusal = _refusal(spec, score, curve)
    return {
        _drift_name(spec.name, name): Score.none(refusal) if refusal else _score(curve, SCALARS[name])
        for name in ([] if spec.name.startswith(("drift/", "set/")) else SCALARS)
    }


def _refusal(spec: MetricSpec, score: Score, curve: _Curve) -> str:
    if score.skipped is not None:
        return score.skipped
    if not curve.windows:
        return f"{spec.name} has no curve over time"
    if curve.num_frames < MIN_SECONDS * curve.fps - 0.5:
        return f"drift needs {MIN_SECONDS:g} s of video; this one has {curve.num_frames / curve.fps:.2f} s"
    return ""


def _score(curve: _Curve, scalar: _Scalar) -> Score:
    try:
        return Score(value=float(scalar.compute(curve)))
    except _NoValueError as error:
        return Score.none(str(error))
