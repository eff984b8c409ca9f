"""A run's results: read back from its folder, with the drift of every curve, and as ``results.json`` (schema 1).

``results.json`` is the same bytes for the same numbers: no times, no paths, no order of work. What a run cost is in
``costs.json`` beside it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from math import isnan
from pathlib import Path
from typing import Any

from longtake import __version__
from longtake.evaluation.drift_scores import drift_scores, drift_specs
from longtake.evaluation.metric import MetricSpec, Score
from longtake.evaluation.paired import mean_interval
from longtake.evaluation.records import SCHEMA, RunScores, VideoScores, read_manifest, score_name
from longtake.evaluation.running.plan import MANIFEST, SCORES, read_json
from longtake.evaluation.scores import TOTALS
from longtake.evaluation.vbench_io import merge_imported, read_imported

RUN_FILE = "run.json"
COSTS_FILE = "costs.json"
RESULTS_FILE = "results.json"


def load_run(folder: Path, *, has_drift: bool = True) -> RunScores:
    """Read a run's folder: what has been measured or imported so far, and the drift of every measure with a curve.

    Args:
        folder: With ``run.json`` and ``scores/``; ``manifest.jsonl`` gives the order of the videos.
        has_drift: Whether drift is computed, which takes most of the time.

    Raises:
        ValueError: If it is no run's folder, or a video has been measured with other metrics.
    """
    record = read_json(folder / RUN_FILE)
    if record is None:
        raise ValueError(f"{folder} is no run of an evaluation: it has no {RUN_FILE}")
    specs = {values["name"]: _spec(values) for values in record["specs"]}
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
    """A run with the drift numbers of every measure that has a curve."""
    specs = dict(run.specs)
    added: list[dict[str, Score]] = [{} for _ in run.videos]
    for spec in run.specs.values():
        if not any(video.scores[spec.name].windows for video in run.videos):
            continue
        for own in drift_specs(spec):
            specs[own.name] = own
        for video, scores in zip(run.videos, added, strict=True):
            if drift_specs(spec):
                scores.update(drift_scores(spec, video.scores[spec.name], video.video.fps))
    videos = [
        replace(video, scores={**video.scores, **scores}) for video, scores in zip(run.videos, added, strict=True)
    ]
    return replace(run, specs=specs, videos=videos)


def run_record(label: str, header: Mapping[str, Any], specs: Sequence[Any], skipped: Mapping[str, str]) -> Any:
    """The content of ``run.json``: what a run measures.

    Args:
        label: Of the run.
        header: Of the run; JSON-able, free of times and paths. The version of the program is added.
        specs: One mapping of a spec's fields per number.
        skipped: {metric: why it is not computed}.
    """
    # Through JSON, so that tuples and lists compare as equal.
    tool = {"name": "longtake", "version": __version__, "git": _git_commit()}
    header = {**header, "tool": tool}
    values = {"schema": SCHEMA, "label": label, "header": header, "specs": specs, "skipped": skipped}
    return json.loads(json.dumps(values))


def results_json(run: RunScores) -> dict[str, Any]:
    """A run's results, schema 1.

    Args:
        run: From :func:`load_run`.

    Returns:
        ``schema``, ``tool``, ``run`` (its header), ``metrics`` and ``scores``. Every metric has the same keys; one
        that was not computed has ``skipped`` and no value. ``scores`` has every score's value, None where members are
        missing; ``reasons`` says which, ``reason`` of ``quality7`` alone. Never NaN.
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
    """Commit of the checkout that the program runs from, None for an installed package."""
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
    """What the files of scores hold, in the order of the manifest, else of prompts and seeds."""
    manifest = folder / MANIFEST
    if manifest.is_file():
        paths = [folder / SCORES / score_name(line.id) for line in read_manifest(manifest)]
        return [values for path in paths if (values := read_json(path)) is not None]
    values = [read_json(path) for path in sorted((folder / SCORES).glob("[!.]*.json"))]
    return sorted(values, key=lambda v: (v["video"]["prompt_index"], v["video"]["seed_index"], v["video"]["id"]))


def _spec(values: Mapping[str, Any]) -> MetricSpec:
    return MetricSpec(**{**values, "range": tuple(values["range"])})


def _metric(run: RunScores, spec: MetricSpec) -> dict[str, Any]:
    scores = [(video.video, video.scores[spec.name]) for video in run.videos if spec.name in video.scores]
    present = [(line, score) for line, score in scores if score.value is not None and score.weight > 0]
    keys = [(line.prompt_index, line.seed_index) for line, _ in present]
    interval = mean_interval(
        {key: score.value for key, (_, score) in zip(keys, present, strict=True)},
        {key: score.weight for key, (_, score) in zip(keys, present, strict=True)},
    )
    limits = [interval.low, interval.high]
    skipped = next((score.skipped for _, score in scores if score.skipped is not None), None)
    return {
        "value": interval.mean * spec.scale if present else None,
        "ci95": None if any(isnan(limit) for limit in limits) else [limit * spec.scale for limit in limits],
        "n_videos": len(present),
        "n_prompts": interval.num_prompts,
        "n_clips": int(sum(score.weight for _, score in present)) if spec.grouping == "clip" else None,
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
    spec = MetricSpec(name=name, higher_is_better=None)
    nothing = {"clip_seconds": None, "grouping": None, "scale": None}
    return {
        **_metric(replace(run, videos=()), spec),
        "provenance": _provenance(run, spec) | nothing,
        "comparable_to_published": False,
        "skipped": reason,
    }


def _unit(spec: MetricSpec) -> str:
    """Of the mean; a metric whose mean is on another scale than its videos says both in numbers."""
    low, high = spec.range
    if spec.scale == 1 or low is None or high is None:
        return spec.unit
    return f"{low * spec.scale:g}..{high * spec.scale:g}"


def _provenance(run: RunScores, spec: MetricSpec) -> dict[str, Any]:
    """Where a number comes from. ``formula`` is a commit of VBench's or ``ours``, ``source`` says more."""
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
    values = asdict(score)
    windows = [[window.start_frame, window.num_frames, window.value] for window in score.windows]
    entry = {"id": name, "value": score.value, "weight": score.weight, "windows": windows}
    return entry | {key: values[key] for key in ("details", "skipped") if values[key]}


def _codec(run: RunScores) -> Mapping[str, Any]:
    """What the measured files were encoded with; where they differ, every way that occurs."""
    known = {json.dumps(video.video.encoder, sort_keys=True) for video in run.videos}
    encoders = [json.loads(text) for text in sorted(known)]
    return encoders[0] if len(encoders) == 1 else {"mixed": encoders} if encoders else {}
