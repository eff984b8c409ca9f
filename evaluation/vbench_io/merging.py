"""Official results as metrics of the run whose videos they score."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from longtake.evaluation.metric import MetricSpec, Score, Window
from longtake.evaluation.records import ManifestLine, RunScores
from longtake.evaluation.sampling import clip_ranges
from longtake.evaluation.scores import DEV_DIMENSIONS
from longtake.evaluation.vbench_io.parsing import Entry, Imported

PROVENANCE = "imported: official VBench"
CLIP_SECONDS = 2.0
NOT_SCORED = "not in the official results that were imported"
AGREES = 1e-4
"""Difference up to which a mean of videos is the official score: frames per video may differ a little."""


def merge_imported(run: RunScores, results: Mapping[str, Imported]) -> RunScores:
    """Add official results to a run; they replace what the run measured under the same names.

    Args:
        run: Whose videos were scored, under their ids, as ``p0007-0`` or as ``PROMPT-0``.
        results: Of :func:`longtake.evaluation.vbench_io.import_results`.

    Returns:
        The run with the metrics, ``imported: official VBench`` among the details of every score and the official
        scores in its header. A video that the results do not hold has no value and says so. VBench-Long's clips of
        two seconds become the windows of a curve.

    Raises:
        ValueError: If a result is of a video that the run does not have, or of one video twice.
    """
    names = _names([video.video for video in run.videos])
    specs = dict(run.specs)
    scores: list[dict[str, Score]] = [dict(video.scores) for video in run.videos]
    header = dict(run.header.get("imported", {}))
    for metric, result in results.items():
        spec = specs[metric] = _spec(result)
        by_video = _by_video(result, names)
        for index, video in enumerate(run.videos):
            scores[index][metric] = _score(result, by_video.get(index, []), video.video)
        header[metric] = _record(result, spec, [own[metric] for own in scores])
    videos = [replace(video, scores=own) for video, own in zip(run.videos, scores, strict=True)]
    skipped = {name: why for name, why in run.skipped.items() if name not in results}
    return replace(run, specs=specs, videos=videos, skipped=skipped, header={**run.header, "imported": header})


def _names(lines: Sequence[ManifestLine]) -> dict[str, int]:
    """{file stem a video may have been scored under: its index}; stems of two videos are none of either."""
    found: dict[str, set[int]] = defaultdict(set)
    for index, line in enumerate(lines):
        stems = (line.id, f"p{line.prompt_index:04d}-{line.seed_index}", f"{line.prompt}-{line.seed_index}")
        for stem in stems:
            found[stem].add(index)
    return {stem: next(iter(indices)) for stem, indices in found.items() if len(indices) == 1}


def _by_video(result: Imported, names: Mapping[str, int]) -> dict[int, list[Entry]]:
    unknown = sorted({entry.video for entry in result.entries} - names.keys())
    if unknown:
        raise ValueError(
            f"{result.file}: {len(unknown)} videos of {result.dimension} are not in this run, e.g. {unknown[0]!r}: "
            "import results of this run's own export."
        )
    grouped: dict[int, dict[str, Entry]] = defaultdict(dict)
    for entry in result.entries:
        own = grouped[names[entry.video]]
        if entry.clip in own:
            raise ValueError(f"{result.file}: {result.dimension} of {entry.clip or entry.video!r} stands there twice.")
        own[entry.clip] = entry
    return {index: [own[clip] for clip in sorted(own)] for index, own in grouped.items()}


def _score(result: Imported, entries: Sequence[Entry], line: ManifestLine) -> Score:
    if not entries:
        return Score.none(NOT_SCORED)
    details = {"provenance": PROVENANCE}
    if result.variant == "short":
        entry = entries[0]
        return Score(value=entry.value, weight=entry.weight or _frame_weight(result, line), details=details)
    values = [entry.value for entry in entries]
    return Score(
        value=sum(values) / len(values),
        weight=float(len(values)),
        windows=_windows(values, line),
        details={**details, "clips": values},
    )


def _frame_weight(result: Imported, line: ManifestLine) -> float:
    """The tool pools frames of all videos in these dimensions; each video gives one less than it has."""
    is_pooled = result.dimension in DEV_DIMENSIONS  # which are the two consistencies
    return float(line.num_frames - 1) if is_pooled and line.num_frames > 1 else 1.0


def _windows(values: Sequence[float], line: ManifestLine) -> tuple[Window, ...]:
    """Clips as a curve, if they are those of two seconds; the last one's frames that no clip before it has."""
    if line.num_frames < 1 or line.fps < 1:
        return ()
    ranges = clip_ranges(line.num_frames, line.fps, int(CLIP_SECONDS))
    if len(ranges) != len(values):
        return ()
    windows, end = [], 0
    for (start, length), value in zip(ranges, values, strict=True):
        windows.append(Window(start_frame=end, num_frames=start + length - end, value=value))
        end = start + length
    return tuple(windows)


def _record(result: Imported, spec: MetricSpec, scores: Sequence[Score]) -> dict[str, object]:
    present = [score for score in scores if score.value is not None]
    total = sum(score.weight for score in present)
    mean = spec.scale * sum(score.value * score.weight for score in present) / total
    notes = list(result.notes)
    if abs(mean - result.official_score) > AGREES:
        notes.append(f"the mean of its videos is {mean:.6f}: the tool weighs or leaves out videos in another way")
    return {
        "provenance": PROVENANCE,
        "file": result.file,
        "commit": result.commit,
        "official_score": result.official_score,
        "notes": notes,
    }


def _spec(result: Imported) -> MetricSpec:
    is_long, is_pooled = result.variant != "short", result.dimension in DEV_DIMENSIONS
    highest = 100.0 if result.dimension == "imaging_quality" else 1.0
    commit = f"vbench@{result.commit[:7]}" if result.commit not in (None, "unknown") else "vbench, commit not recorded"
    flag = {"short": "", "long": ", no --dev_flag", "long_dev": ", --dev_flag"}[result.variant] if is_pooled else ""
    return MetricSpec(
        name=result.metric,
        higher_is_better=None if result.dimension == "dynamic_degree" else True,
        unit=f"0..{highest:g}",
        range=(-1.0 if result.dimension.endswith(("style", "overall_consistency")) else 0.0, highest),
        formula=f"{commit}{' long' if is_long else ''}{flag}",
        backbone=PROVENANCE,
        clip_seconds=CLIP_SECONDS if is_long else None,
        grouping="clip" if is_long else "frame" if is_pooled else "video",
        scale=1.0 / highest,
        description="As the official tool computed it.",
    )
