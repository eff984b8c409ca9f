"""Contents of a report: policies with colours, measures with titles, numbers with digits, flags of videos."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil, isfinite, log10
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from longtake.evaluation.metric import PREFIXES, Score
from longtake.evaluation.published import Row
from longtake.evaluation.records import ManifestLine, RunScores

_NUM_HUES, _NUM_STYLES = 8, 3  # hues times line styles are the policies that can be told apart; then colours repeat
_HEADLINES = (
    r"vbench(_form)?/(long/)?subject_consistency",
    r"vbench(_form)?/(long/)?background_consistency",
    r"vbench(_form)?/(long/)?motion_smoothness",
    r"vbench(_form)?/(long/)?dynamic_degree",
    r"vbench(_form)?/(long/)?aesthetic_quality",
    r"vbench(_form)?/(long/)?imaging_quality",
    r"vbench(_form)?/(long/)?overall_consistency",
    r"judge/mean_of_six",
    r"judge/background_psnr",
    r"judge/motion_magnitude",
    r"proxy/flow_magnitude_mean",
    r"proxy/nss_drift_self",
    r"proxy/chunk_seam_ratio",
    r"proxy/warp_error",
    r"vbench(_form)?/(long/)?temporal_flickering",
)
"""Measures of the first table in order of preference: the first eight that were taken."""
_NUM_HEADLINES = 8

_ACRONYMS = (r"\bpsnr\b", r"\bnss\b", r"\bvde\b", r"\bfvd\b", r"\bclip\b(?= score)")

MOTION = (r"proxy/flow_magnitude_mean", r"judge/motion_magnitude", r"vbench(_form)?/(long/)?dynamic_degree")
CONSISTENCY = (
    r"vbench(_form)?/(long/)?subject_consistency",
    r"judge/background_psnr",
    r"vbench(_form)?/(long/)?background_consistency",
)
SEAMS = (r"proxy/chunk_seam_ratio",)

LIGHT_PAGE = "#ffffff"
DARK_PAGE = "#14171c"
LIGHT = ("#23272f", "#0035a9", "#bc3b09", "#30846f", "#9557d9", "#b28e1a", "#1c9fb6", "#734367", "#792908")
"""Colours of policies: neutral for the baseline, then eight hues in the order in which they are given out.

Found by search in OKLab: any two are at least 0.09 apart in normal vision and in simulated protanopia, deuteranopia
and tritanopia, with a contrast of 3 : 1 or more to the page. Tests check both.
"""
DARK = ("#eceff4", "#3979d7", "#e1461c", "#2ddbab", "#c6a0fd", "#efd329", "#55afae", "#ac5b8b", "#e99431")
"""The same hues for a dark page."""

VERDICTS = {"up": ("\u25b2", "better"), "down": ("\u25bc", "worse"), "sig": ("\u25c6", "different"), "": ("", "")}
"""{verdict: (sign, word)} of a significant difference to the baseline."""

_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters, which no page may hold, and those that reverse the direction of the text after them."""

COSTS = {
    "attention_density": "attention density",
    "ms_per_block": "ms per block",
    "kv_mb": "KV MB",
    "first_frame_s": "first frame, s",
    "kv_mb_peak": "KV MB, peak",
    "generation_cpu_s": "processor s",
}
"""Titles of known costs; others are shown under their own names."""
MAIN_COSTS = ("attention_density", "ms_per_block", "kv_mb", "first_frame_s")
"""In the first table; all of them have one of their own."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its 95 % interval, or the reason why there is none.

    ``low`` and ``high`` are None with a single prompt; ``extra`` holds all fields of the comparison's cell.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, cell: Mapping[str, Any] | None, key: str = "mean") -> "Estimate":
        """Read a cell of a comparison; one that is absent, empty or not finite is not measured."""
        if cell is None:
            return cls(value=None, reason="not part of this comparison")
        value = finite(cell.get(key))
        if value is None:
            return cls(value=None, reason=str(cell.get("skipped") or "no video has a value"))
        return cls(value=value, low=finite(cell.get("low")), high=finite(cell.get("high")), extra=cell)

    @property
    def is_significant(self) -> bool:
        return bool(self.extra.get("significant"))


def plain_text(value: object) -> str:
    """Text that can be shown anywhere: without control characters and lone surrogates."""
    return _INVISIBLE.sub("", str(value).encode("utf-8", "replace").decode("utf-8"))


def finite(value: Any) -> float | None:
    """A finite number as a float; None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if isfinite(value) else None


def digits_for(estimates: Iterable[Estimate], *, figures: int = 3, most: int = 5) -> int:
    """Decimals of a column: two digits of the median half interval, or some ``figures`` of the largest number."""
    known = [item for item in estimates if item.value is not None]
    halves = [(item.high - item.low) / 2 for item in known if item.low is not None and item.high is not None]
    halves = [half for half in halves if half > 0.0]
    if halves:
        digits = 1 - _exponent(median(halves))
    else:
        sizes = [abs(item.value) for item in known if item.value]
        digits = figures - 1 - _exponent(max(sizes)) if sizes else 0
    return min(max(digits, 0), most)


def _exponent(value: float) -> int:
    return ceil(log10(value) + 1e-9) - 1


def number(value: float | None, digits: int, *, signed: bool = False) -> str:
    """A number as text, with a true minus sign and narrow spaces between thousands; an empty text for None."""
    if value is None:
        return ""
    text = f"{value:{'+' if signed else ''},.{digits}f}".replace(",", "\u202f")
    if not re.search("[1-9]", text):
        text = text.lstrip("+-")
    return text.replace("-", "\u2212")


def interval(estimate: Estimate, digits: int, *, signed: bool = False) -> str:
    """An interval as text; an empty text where there is none."""
    if estimate.low is None or estimate.high is None:
        return ""
    between = " to " if signed or estimate.low < 0 else "\u2013"
    return between.join(number(end, digits, signed=signed) for end in (estimate.low, estimate.high))


class Measure:
    """One metric of a comparison as a report shows it."""

    def __init__(self, name: str, entry: Mapping[str, Any]) -> None:
        self.name = name
        self.entry = entry
        self.spec: Mapping[str, Any] = entry.get("spec") or {}
        self.family = next((prefix[:-1] for prefix in PREFIXES if name.startswith(prefix)), "")
        self.place, _, word = re.sub(r"\[.*?\]", "", name).rpartition("/")
        self.place += "/"
        drifting = f"{self.place.split('/')[-2]}, " if self.family == "drift" else ""
        words = re.sub("|".join(_ACRONYMS), lambda found: found[0].upper(), (drifting + word).replace("_", " "))
        self.title = words[:1].upper() + words[1:]
        self.backbone = ", ".join(re.findall(r"\[(.*?)\]", name))
        unit = self.spec.get("unit") or ""
        self.unit = "" if unit == "0..1" else str(unit)
        better = self.spec.get("higher_is_better")
        self.direction = 0 if better is None else 1 if better else -1
        self.direction_text = {1: "higher is better", -1: "lower is better", 0: "neither is better"}[self.direction]
        self.least, self.greatest = self.spec.get("range") or (None, None)
        self.is_comparable = self.family == "vbench"
        self.moments: Mapping[str, Any] = entry.get("at") or {}

    @property
    def note(self) -> str:
        stand_in = f"[{self.backbone}]" if self.backbone else ""
        return " \u00b7 ".join(filter(None, (self.place + stand_in, self.unit, self.direction_text)))

    @property
    def description(self) -> str:
        formula = self.spec.get("formula")
        notes = (formula and f"formula {formula}", self.unit, self.direction_text, self.spec.get("description"))
        return " \u00b7 ".join(str(note) for note in notes if note)

    def level(self, label: str, moment: str | None = None) -> Estimate:
        return Estimate.read(self._part("runs", moment).get(label))

    def difference(self, label: str, moment: str | None = None) -> Estimate:
        return Estimate.read(self._part("paired", moment).get(label), "difference")

    def verdict(self, label: str, moment: str | None = None) -> str:
        """``up``, ``down`` or ``sig`` for a significantly better, worse or other value than the baseline's."""
        difference = self.difference(label, moment)
        if difference.value is None or not difference.is_significant:
            return ""
        gain = self.direction * difference.value
        return "up" if gain > 0 else "down" if gain < 0 else "sig"

    def digits(self, moment: str | None = None) -> int:
        return digits_for(self.level(label, moment) for label in self._part("runs", moment))

    def detectable(self, labels: Iterable[str], moment: str | None = None) -> float | None:
        """The smallest difference that could be found, of the policy where it is largest."""
        sizes = [finite(self.difference(label, moment).extra.get("minimum_detectable")) for label in labels]
        return max((size for size in sizes if size is not None), default=None)

    def curve(self, label: str) -> list[Mapping[str, Any]]:
        """Windows of a run in order; empty where the metric has no curve."""
        return list((self.entry.get("curves") or {}).get(label) or [])

    @property
    def has_curve(self) -> bool:
        """True if any run has two windows with values, which make a line."""
        curves = (self.entry.get("curves") or {}).values()
        return any(sum(finite(point.get("mean")) is not None for point in points) > 1 for points in curves)

    def _part(self, part: str, moment: str | None) -> Mapping[str, Any]:
        source = self.entry if moment is None else self.moments.get(moment) or {}
        return source.get(part) or {}


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Contents of one report."""

    # One per policy; flags, costs, points of the scatter and reasons for missing numbers come from them.
    runs: Sequence[RunScores]
    comparison: Mapping[str, Any]  # result of :func:`longtake.evaluation.comparison.compare_runs`
    commands: Sequence[str] = ()  # command lines that reproduce the numbers
    # The resolved protocol; its ``name`` and ``fingerprint`` stand in the page's head.
    protocol: Mapping[str, Any] = field(default_factory=dict)
    # {label: folder of its videos} for filmstrips; without it there are none.
    videos: Mapping[str, Path] = field(default_factory=dict)
    # Rows of published numbers, shown in grey as context; best those of videos about as long.
    published: Sequence[Row] = ()
    headline: Sequence[str] | None = None  # names of the measures in the first table; None takes the usual ones

    @cached_property
    def labels(self) -> list[str]:
        labels = [str(label) for label in self.comparison.get("labels") or [run.label for run in self.runs]]
        return sorted(labels, key=lambda label: label != self.baseline)

    @property
    def baseline(self) -> str:
        return str(self.comparison.get("baseline") or "")

    @property
    def is_compared(self) -> bool:
        return bool(self.baseline and self.others)

    @property
    def others(self) -> list[str]:
        return [label for label in self.labels if label != self.baseline]

    def run(self, label: str) -> RunScores | None:
        return next((run for run in self.runs if run.label == label), None)

    def index(self, label: str) -> int:
        return self.labels.index(label)

    def hue_and_line(self, label: str) -> tuple[int, int]:
        """Indices of a policy's colour and line style: neutral for the baseline, then hue by hue, then dashes."""
        order = self.others or self.labels
        if label not in order:
            return 0, 0
        return order.index(label) % _NUM_HUES + 1, order.index(label) // _NUM_HUES % _NUM_STYLES

    def style(self, label: str) -> str:
        return "h{} s{}".format(*self.hue_and_line(label))

    @cached_property
    def measures(self) -> dict[str, Measure]:
        """Every measure that has a value somewhere, by name, in the order of the prefixes."""
        entries = self.comparison.get("metrics") or {}
        found = [Measure(name, entry) for name, entry in entries.items()]
        order = {prefix[:-1]: position for position, prefix in enumerate(PREFIXES)}
        found.sort(key=lambda measure: (order.get(measure.family, len(order)), measure.name))
        is_known = {item.name: any(item.level(label).value is not None for label in self.labels) for item in found}
        return {measure.name: measure for measure in found if is_known[measure.name]}

    @cached_property
    def headlines(self) -> list[Measure]:
        """Measures of the first table; refuses one that was asked for and not measured."""
        if self.headline is None:
            found = [self.first((pattern,)) for pattern in _HEADLINES]
            chosen = [measure for measure in found if measure is not None][:_NUM_HEADLINES]
            return chosen or list(self.measures.values())[:_NUM_HEADLINES]
        unknown = [name for name in self.headline if name not in self.measures]
        if unknown:
            known = ", ".join(self.measures) or "none"
            raise ValueError(f"headline measure {unknown[0]!r} has no value in this comparison; measured: {known}.")
        return [self.measures[name] for name in self.headline]

    def first(self, patterns: Sequence[str]) -> Measure | None:
        """The measured one that fits the first pattern; official ones before others, clips before whole videos."""
        for pattern in patterns:
            found = [item for name, item in self.measures.items() if re.fullmatch(pattern, name.partition("[")[0])]
            if found:
                return min(found, key=lambda measure: (not measure.is_comparable, "/long/" not in measure.name))
        return None

    @cached_property
    def flags(self) -> list[tuple[Any, ...]]:
        """(label, video id, prompt, *flag) of flagged videos, in the order of the runs and their manifests."""
        return [
            (run.label, video.video.id, video.video.prompt, *flag)
            for run in self.runs
            for video in run.videos
            for flag in _find_flags(video.scores)
        ]

    @cached_property
    def moments(self) -> list[str]:
        """Seconds that the tables of moments stand for, ascending, as the comparison names them."""
        known = {moment for measure in self.measures.values() for moment in measure.moments}
        return sorted(known, key=float)

    @cached_property
    def costs(self) -> dict[str, str]:
        present = {name for run in self.runs for name, value in run.costs.items() if finite(value) is not None}
        names = [*(name for name in COSTS if name in present), *sorted(present - COSTS.keys())]
        return {name: COSTS.get(name, name.replace("_", " ")) for name in names}

    def cost(self, label: str, name: str) -> float | None:
        run = self.run(label)
        return None if run is None else finite(run.costs.get(name))

    def largest_cost(self, name: str) -> float:
        known = [finite(run.costs.get(name)) for run in self.runs]
        return max((abs(value) for value in known if value is not None), default=0.0)

    @cached_property
    def skipped(self) -> dict[tuple[str, str], list[str]]:
        """{(measure, reason): labels of the runs that lack it}; a measure without any value counts as well."""
        reasons = {(name, run.label): reason for run in self.runs for name, reason in run.skipped.items()}
        for name, entry in (self.comparison.get("metrics") or {}).items():
            for label, cell in (entry.get("runs") or {}).items():
                estimate = Estimate.read(cell)
                if estimate.value is None:
                    reasons.setdefault((name, label), estimate.reason)
        found: dict[tuple[str, str], list[str]] = {}
        for (name, label), reason in sorted(reasons.items()):
            found.setdefault((name, reason), []).append(label)
        return found

    @cached_property
    def lines(self) -> list[tuple[str, ManifestLine]]:
        return [(run.label, video.video) for run in self.runs for video in run.videos]

    @property
    def num_prompts(self) -> int:
        return len({line.prompt_index for _, line in self.lines})

    @property
    def num_seeds(self) -> int:
        """Most videos that one run has of one prompt."""
        return max(Counter((label, line.prompt_index) for label, line in self.lines).values(), default=0)

    @property
    def seconds(self) -> tuple[float, float] | None:
        lengths = [line.num_frames / line.fps for _, line in self.lines if line.num_frames and line.fps]
        return (min(lengths), max(lengths)) if lengths else None


# Flags: each has one measure behind it, and a threshold between what healthy videos score (true scenes of the bundled
# world, moving shapes over texture, with and without grain) and what the fault scores at its mildest worth reporting.
_STATIC_SHARE = 0.98
"""Of the video's quarter seconds, which leaves room for a hiccup; or every frame looks like the last. True scenes in
which objects hide reach 0.1."""
_FROZEN_SECONDS = 1.75  # objects of true scenes hide behind their pillar for up to 1.6
_FROZEN_OVER_REST = 1.5
"""A tail is longer than any rest before it by this factor: objects may be out of view for a while now and then."""
_LOOP_SHARE = 0.25  # of the video; a loop is followed for two periods before it scores at all
_LOOP_MARGIN_S = 0.25
_PERIOD_TOLERANCE = 0.03
_FLICKER_LEVELS = 1.0
"""Grey levels, in some two-second window: 0.4 % of full brightness. Moving scenes stay under 0.1, what the mini model
makes of them and pictures of pure noise under 0.6."""
_DRIFT_LEVELS = 12.0
"""Grey levels within a shot: clearly seen side by side. True scenes stay under 1, moving shapes under 3."""
_DRIFT_STEADINESS = 0.7
"""Drifts of any course reach 0.95; the colours of what comes and goes may be far apart, but stay under 0.6."""
_SEAM_RATIO = 2.0  # the mini model's blocks give 0.9 to 1.1

Stretch = tuple[float, float, str]  # (start, end, sentence for the report), in seconds
_Rule = Callable[[float, Mapping[str, Any], Mapping[str, Score]], Iterator[Stretch]]


class _Flag(NamedTuple):
    """Something that is wrong with a video, which a mean does not show; ``kind`` is one of :data:`KINDS`."""

    kind: str
    start_s: float
    end_s: float
    message: str


def _find_flags(scores: Mapping[str, Score]) -> list[_Flag]:
    """Find what is wrong with a video by its scores, in the order of :data:`KINDS`; there may be several cuts.

    A flag whose measure is missing or has no value is not raised.
    """
    found: list[_Flag] = []
    for kind, (name, rule) in KINDS.items():
        score = scores.get(name)
        if score is not None and score.value is not None:
            found += [_Flag(kind, *stretch) for stretch in rule(score.value, score.details, scores)]
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
    """True if the prompt itself asks for what repeats so: the bundled world's scenes are periodic."""
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
    """True for a cut after a loop's first play, or once more a period later."""
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
