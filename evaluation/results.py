"""A run's results: read back from its folder, with the drift of every curve, and as ``results.json`` (schema 1).

``results.json`` is the same bytes for the same numbers: no times, no paths, no order of work. What a run cost is in
``costs.json`` beside it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from math import isnan, log
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from longtake import __version__
from longtake.evaluation.intervals import mean_interval
from longtake.evaluation.metric import MetricSpec, Score, Window
from longtake.evaluation.records import (
    MANIFEST,
    SCHEMA,
    SCORES,
    RunScores,
    VideoScores,
    read_json,
    read_manifest,
    score_name,
)
from longtake.evaluation.scores import TOTALS
from longtake.evaluation.vbench_io import merge_imported, read_imported

RUN_FILE = "run.json"
COSTS_FILE = "costs.json"
RESULTS_FILE = "results.json"
_SPAN_SECONDS = 5.0
_MIN_SECONDS = 2 * _SPAN_SECONDS
_NUM_CHUNKS = 10


class _NoValueError(Exception):
    """Why a curve has no such number; its text is the score's reason."""


@dataclass(frozen=True, kw_only=True)
class _Curve:
    windows: tuple[Window, ...]
    num_frames: int
    fps: float

    def mean(self, start: float, end: float) -> float:
        total = weight = 0.0
        for window in self.windows:
            inside = min(end, window.start_frame + window.num_frames) - max(start, window.start_frame)
            if inside > 0:
                total, weight = total + inside * (window.value or 0.0), weight + inside
        if not weight:
            raise _NoValueError(f"no value between {start / self.fps:g} s and {end / self.fps:g} s")
        return total / weight

    @property
    def first(self) -> float:
        return self.mean(0, _SPAN_SECONDS * self.fps)

    @property
    def last(self) -> float:
        return self.mean(self.num_frames - _SPAN_SECONDS * self.fps, self.num_frames)


def _helios(curve: _Curve) -> float:
    span = 0.15 * curve.num_frames
    return abs(curve.mean(0, span) - curve.mean(curve.num_frames - span, curve.num_frames))


def _vde(weigh: Callable[[float], float], curve: _Curve) -> float:
    edges = np.linspace(0, curve.num_frames, _NUM_CHUNKS + 1).tolist()
    means = [curve.mean(start, end) for start, end in zip(edges, edges[1:], strict=False)]
    if means[0] <= 0:
        raise _NoValueError(f"relative to the first tenth, which is {means[0]:g}: not above 0")
    return sum(weigh(_NUM_CHUNKS - i) * abs(means[i] - means[0]) for i in range(1, _NUM_CHUNKS)) / means[0]


def _slope(curve: _Curve) -> float:
    if len(curve.windows) < 2:
        raise _NoValueError("a line needs two windows with a value")
    minutes = np.array([(w.start_frame + w.num_frames / 2) / curve.fps / 60 for w in curve.windows])
    values = np.array([w.value for w in curve.windows])
    centred = minutes - minutes.mean()
    return float(centred @ (values - values.mean()) / (centred @ centred))


def _ratio(curve: _Curve) -> float:
    if curve.first <= 0:
        raise _NoValueError(f"relative to the first {_SPAN_SECONDS:g} s, which are {curve.first:g}: not above 0")
    return curve.last / curve.first


class _Scalar(NamedTuple):
    """One number of a curve.

    ``better``: 1 if more is better where more of the measure is, -1 if less is, 0 if less is always better.
    """

    compute: Callable[[_Curve], float]
    better: int
    description: str
    is_relative: bool = False
    source: str = "ours"


_WEIGHED = "change of ten chunks relative to the first, {} weights, early ones most"
SCALARS = {
    "first5": _Scalar(lambda c: c.first, 1, "mean of the first 5 s"),
    "last5": _Scalar(lambda c: c.last, 1, "mean of the last 5 s"),
    "delta5": _Scalar(lambda c: c.first - c.last, -1, "first 5 s less last 5 s, signed", source="Forcing-KV"),
    "abs": _Scalar(lambda c: abs(c.first - c.last), 0, "|first 5 s - last 5 s|"),
    "helios15": _Scalar(_helios, 0, "|first 15 % of the frames - last 15 %|", source="Helios"),
    "vde_linear": _Scalar(partial(_vde, float), 0, _WEIGHED.format("linear"), is_relative=True, source="BlockVid"),
    "vde_log": _Scalar(partial(_vde, log), 0, _WEIGHED.format("logarithmic"), is_relative=True, source="BlockVid"),
    "slope_per_minute": _Scalar(_slope, 1, "least-squares slope over the windows, per minute"),
    "last_over_first": _Scalar(_ratio, 1, "last 5 s over first 5 s", is_relative=True),
}
"""{name: how it is made of a curve}; the last part of ``drift/METRIC/SCALAR``, the metric with its prefix."""


def _drift_specs(spec: MetricSpec) -> tuple[MetricSpec, ...]:
    if spec.name.startswith(("drift/", "set/")):
        return ()
    return tuple(_spec(spec, name, scalar) for name, scalar in SCALARS.items())


def _spec(spec: MetricSpec, name: str, scalar: _Scalar) -> MetricSpec:
    higher = None if spec.higher_is_better is None else spec.higher_is_better == (scalar.better == 1)
    return replace(
        spec,
        name=f"drift/{spec.name}/{name}",
        higher_is_better=higher if scalar.better else False,
        unit="" if scalar.is_relative else spec.unit,
        range=spec.range if name in ("first5", "last5") else (None, None),
        formula=scalar.source,
        grouping="video",
        scale=1.0 if scalar.is_relative else spec.scale,
        description=f"{scalar.description}, of the curve of {spec.name}.",
    )


def _drift_scores(spec: MetricSpec, score: Score, fps: float) -> dict[str, Score]:
    """The drift of one measure on one video: {name: score}, one for every one of :func:`drift_specs`.

    None has a value where the video is under ten seconds, or the measure has no curve or no value; windows without a
    value are left out.
    """
    if not fps > 0:
        raise ValueError(f"fps={fps} of a video must be above 0.")
    windows = tuple(window for window in score.windows if window.value is not None)
    num_frames = score.windows[-1].start_frame + score.windows[-1].num_frames if score.windows else 0
    curve = _Curve(windows=windows, num_frames=num_frames, fps=fps)
    refusal = _refusal(spec, score, curve)
    return {
        own.name: Score.none(refusal) if refusal else _score(curve, scalar)
        for own, scalar in zip(_drift_specs(spec), SCALARS.values(), strict=False)
    }


def _refusal(spec: MetricSpec, score: Score, curve: _Curve) -> str:
    if score.skipped is not None:
        return score.skipped
    if not curve.windows:
        return f"{spec.name} has no curve over time"
    if curve.num_frames < _MIN_SECONDS * curve.fps - 0.5:
        return f"drift needs {_MIN_SECONDS:g} s of video; this one has {curve.num_frames / curve.fps:.2f} s"
    return ""


def _score(curve: _Curve, scalar: _Scalar) -> Score:
    try:
        return Score(value=float(scalar.compute(curve)))
    except _NoValueError as error:
        return Score.none(str(error))


def load_run(folder: Path, *, has_drift: bool = True) -> RunScores:
    """Read a run's folder: what has been measured or imported so far, and the drift of every measure with a curve.

    Drift, which takes most of the time, is left out without ``has_drift``.
    """
    record = read_json(folder / RUN_FILE)
    if record is None:
        raise ValueError(f"{folder} is no run of an evaluation: it has no {RUN_FILE}")
    specs = {v["name"]: MetricSpec(**{**v, "range": tuple(v["range"])}) for v in record["specs"]}
    videos = [VideoScores.from_json(values) for values in _score_files(folder)]
    for video in videos:
        if strange := video.scores.keys() ^ specs.keys():
            raise ValueError(
                f"{folder}: {video.video.id} was measured with other metrics ({sorted(strange)[0]}): delete its file "
                f"in {SCORES}, then run the same command again"
            )
    run = RunScores(
        label=record["label"],
        specs=specs,
        videos=videos,
        header=record["header"],
        skipped=record["skipped"],
        costs=read_json(folder / COSTS_FILE) or {},
    )
    imported = read_imported(folder)
    run = merge_imported(run, imported) if imported else run
    return _with_drift(run) if has_drift else run


def _with_drift(run: RunScores) -> RunScores:
    curved = [spec for spec in run.specs.values() if any(video.scores[spec.name].windows for video in run.videos)]
    specs = {own.name: own for spec in curved for own in _drift_specs(spec)}
    videos = []
    for video in run.videos:
        scores = dict(video.scores)
        for spec in curved:
            scores |= _drift_scores(spec, video.scores[spec.name], video.video.fps)
        videos.append(replace(video, scores=scores))
    return replace(run, specs={**run.specs, **specs}, videos=videos)


def run_record(label: str, header: Mapping[str, Any], specs: Sequence[Any], skipped: Mapping[str, str]) -> Any:
    """The content of ``run.json``: a run's header with the version of the program, specs, and reasons for gaps."""
    header = {**header, "tool": {"name": "longtake", "version": __version__, "git": _git_commit()}}
    values = {"schema": SCHEMA, "label": label, "header": header, "specs": specs, "skipped": skipped}
    # Through JSON, so that tuples and lists compare as equal.
    return json.loads(json.dumps(values))


def results_json(run: RunScores) -> dict[str, Any]:
    """Results of a run, schema 1: ``schema``, ``tool``, ``run`` (its header), ``metrics`` and ``scores``.

    Every metric has the same keys; one that was not computed has ``skipped`` and no value. ``scores`` has every
    score's value, None where members are missing; ``reasons`` says which, ``reason`` of ``quality7`` alone. Never NaN.
    """
    metrics = {name: _metric(run, spec) for name, spec in run.specs.items()}
    means = {name: entry["value"] for name, entry in metrics.items() if entry["value"] is not None}
    for name, reason in run.skipped.items():
        metrics.setdefault(name, _skipped(run, name, reason))
    totals = {name: compute(means) for name, compute in TOTALS.items()}
    # Every member is one of vbench/.
    reasons = {name: reason.replace("vbench/", "") for name, (_, reason) in totals.items() if reason is not None}
    scores = {name: value for name, (value, _) in totals.items()}
    scores |= {"reason": reasons.get("quality7"), "reasons": reasons}
    header = dict(run.header)
    return {
        "schema": SCHEMA,
        "tool": header.pop("tool"),
        "run": {"label": run.label, "num_videos": len(run.videos), **header},
        "metrics": metrics,
        "scores": scores,
    }


@cache
def _git_commit() -> str | None:
    git = Path(__file__).resolve().parents[1] / ".git"
    try:
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        if (git / name).is_file():
            return (git / name).read_text(encoding="utf-8").strip()
        packed = (git / "packed-refs").read_text(encoding="utf-8").splitlines()
        return next((line.split()[0] for line in packed if line.endswith(f" {name}")), None)
    except OSError:
        return None


def _score_files(folder: Path) -> list[Any]:
    """Contents of the files of scores, in the order of the manifest, else of prompts and seeds."""
    manifest = folder / MANIFEST
    if manifest.is_file():
        paths = [folder / SCORES / score_name(line.id) for line in read_manifest(manifest)]
        return [values for path in paths if (values := read_json(path)) is not None]
    values = [read_json(path) for path in sorted((folder / SCORES).glob("[!.]*.json"))]
    return sorted(values, key=lambda v: (v["video"]["prompt_index"], v["video"]["seed_index"], v["video"]["id"]))


def _metric(run: RunScores, spec: MetricSpec) -> dict[str, Any]:
    scores = [(video.video, video.scores[spec.name]) for video in run.videos if spec.name in video.scores]
    present = {
        (line.prompt_index, line.seed_index): (score.value, score.weight)
        for line, score in scores
        if score.value is not None and score.weight > 0
    }
    interval = mean_interval(
        {key: value for key, (value, _) in present.items()}, {key: weight for key, (_, weight) in present.items()}
    )
    limits = [interval.low, interval.high]
    skipped = next((score.skipped for _, score in scores if score.skipped is not None), None)
    return {
        "value": interval.mean * spec.scale if present else None,
        "ci95": None if any(isnan(limit) for limit in limits) else [limit * spec.scale for limit in limits],
        "n_videos": len(present),
        "n_prompts": interval.num_prompts,
        "n_clips": int(sum(weight for _, weight in present.values())) if spec.grouping == "clip" else None,
        "higher_is_better": spec.higher_is_better,
        "unit": _unit(spec),
        "range": [limit if limit is None else limit * spec.scale for limit in spec.range],
        "per_video_range": list(spec.range),
        "description": spec.description,
        "provenance": _provenance(run, spec),
        "comparable_to_published": spec.comparable_to_published,
        "per_video": [_per_video(line.id, score) for line, score in scores],
        "skipped": None if present else skipped or "no video has been measured",
    }


def _skipped(run: RunScores, name: str, reason: str) -> dict[str, Any]:
    """A metric that nothing is known of but why it is not there: all keys, no numbers."""
    entry = _metric(replace(run, videos=()), MetricSpec(name=name, higher_is_better=None))
    nothing = {"clip_seconds": None, "grouping": None, "scale": None, "codec": _codec(run)}
    entry["provenance"] |= nothing
    return entry | {"comparable_to_published": False, "skipped": reason}


def _unit(spec: MetricSpec) -> str:
    """Unit of the mean; a metric whose mean is on another scale than its videos says both in numbers."""
    low, high = spec.range
    if spec.scale == 1 or low is None or high is None:
        return spec.unit
    return f"{low * spec.scale:g}..{high * spec.scale:g}"


def _provenance(run: RunScores, spec: MetricSpec) -> dict[str, Any]:
    """Provenance of a number. ``formula`` is a commit of VBench's or ``ours``, ``source`` says more."""
    _, _, stem = spec.name.removeprefix("drift/").partition("/")
    is_vbench, is_long = spec.name.startswith(("vbench/", "vbench_form/")), stem.startswith(("long/", "long_dev/"))
    return {
        "formula": spec.formula.split(" ")[0].rstrip(",") if spec.formula.startswith("vbench") else "ours",
        "source": spec.formula,
        "backbone": spec.backbone,
        "weights_sha256": spec.weights_sha256,
        "transform": spec.transform,
        "clip_seconds": spec.clip_seconds,
        "grouping": spec.grouping,
        "scale": spec.scale,
        # VBench-Long's switches, which change numbers and are not told in tables.
        "dev_flag": stem.startswith("long_dev/") if is_long else None,
        "static_filter": False if is_vbench else None,
        "codec": _codec(run),
    }


def _per_video(name: str, score: Score) -> dict[str, Any]:
    windows = [[window.start_frame, window.num_frames, window.value] for window in score.windows]
    entry = {"id": name, "value": score.value, "weight": score.weight, "windows": windows}
    return entry | {key: value for key in ("details", "skipped") if (value := getattr(score, key))}


def _codec(run: RunScores) -> Mapping[str, Any]:
    known = {json.dumps(video.video.encoder, sort_keys=True) for video in run.videos}
    encoders = [json.loads(text) for text in sorted(known)]
    return encoders[0] if len(encoders) == 1 else {"mixed": encoders} if encoders else {}
