"""The official VBench: a run's videos in the layout it expects, and its results as metrics of a run."""

import json
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from longtake.configs.fields import did_you_mean
from longtake.evaluation.metric import MetricSpec, Score, Window
from longtake.evaluation.preprocessing import clip_ranges
from longtake.evaluation.records import ManifestLine, RunScores, read_manifest, write_atomically, write_json
from longtake.evaluation.scores import DEV_DIMENSIONS, QUALITY, SEMANTIC, Variant, member_name

COMMIT = "45e79ec14e69a2187202c675d2dbce1a71843d53"
DIMENSIONS = (*QUALITY, *SEMANTIC)  # all sixteen, as the official tool spells them
CUSTOM_DIMENSIONS = (*QUALITY, "overall_consistency")
"""Scored on videos of one's own: the README's six, and two more that run though it does not list them."""
PROMPT_DIMENSIONS = ("overall_consistency", "temporal_style", "human_action")
"""Run on videos of one's own, and read the prompt."""
LONG_DIMENSIONS = tuple(name for name in QUALITY if name != "temporal_flickering")
"""VBench-Long's on videos of one's own; it would read prompts from folder names, so none that needs a prompt."""
_MODES = {
    "custom": (CUSTOM_DIMENSIONS, (*CUSTOM_DIMENSIONS, "temporal_style", "human_action"), "custom_input"),
    "long": (LONG_DIMENSIONS, LONG_DIMENSIONS, "long_custom_input"),
    "standard": (DIMENSIONS, DIMENSIONS, "vbench_standard"),
}
"""{mode: (dimensions scored unless others are named, all that it has, its name in the official tool)}."""
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
LONG_SECONDS = 5.0  # VBench's FAQ: VBench below, VBench-Long from here on
MAX_CRF = 12  # above it the codec shows in flickering and imaging quality; our own default for evaluation
EXPORT_FILE, IMPORTED_FILE = "export.json", "imported.json"


@dataclass(frozen=True, kw_only=True)
class Export:
    """Videos as they were laid out."""

    mode: str  # the official tool's ``--mode``
    dimensions: tuple[str, ...]  # to be scored
    dev_flag: bool | None  # VBench-Long's ``--dev_flag``; None where there is no such flag
    commit: str  # of the official repository that the script is written for
    files: Mapping[str, str]  # {path below ``videos/``: id in the run}
    notes: tuple[str, ...]  # for a reader of the scores


def export_videos(
    run: Path,
    out: Path,
    *,
    mode: str,
    dimensions: Sequence[str] | None = None,
    dev_flag: bool = False,
    full_info: Path | None = None,
    num_samples: int = NUM_SAMPLES,
    allow_missing: bool = False,
) -> Export:
    """Lay a run's videos out for the official VBench; papers rarely say which mode and flag they used.

    Args:
        run: Folder with ``manifest.jsonl``; in mode ``standard`` its prompts are VBench's, also where the model read
            longer ones.
        out: New or empty folder: ``videos/p0007-0.mp4`` (``standard``: ``videos/FOLDER/PROMPT-0.mp4``), ``run.sh``,
            ``README.md``, ``export.json``. Videos are hard links where the disk allows it, else copies. The tool
            writes clips into the folder and uses them again, so it must not have been used before.
        mode: ``custom`` for whole videos; ``long`` for VBench-Long's clips of two seconds, which reads no prompts;
            ``standard`` for VBench's own prompts.
        dimensions: To score; all of the mode unless given.
        dev_flag: VBench-Long's: half clip-to-clip consistency through a quantile table instead of in-clip alone.
        full_info: VBench's ``VBench_full_info.json``, for mode ``standard``.
        num_samples: Videos per prompt, for mode ``standard``.
        allow_missing: Lay out what is there. VBench only warns of missing videos, and its score is then of others.

    Raises:
        ValueError: If the folder is not empty, a video is missing or no ``.mp4``, a prompt is missing or none of
            VBench's, or a dimension needs VBench's own prompts. Nothing is left behind.
    """
    if mode not in _MODES:
        raise ValueError(f"unknown mode {mode!r}; known: {', '.join(_MODES)}.")
    usual, allowed, name = _MODES[mode]
    dimensions = usual if dimensions is None else dimensions
    _check_dimensions(dimensions, allowed, mode=mode)
    if mode == "standard":
        if full_info is None:
            raise ValueError("mode standard needs VBench's list of prompts: give the path of VBench_full_info.json.")
        return _export_standard(run, out, full_info, dimensions, num_samples=num_samples, allow_missing=allow_missing)
    lines = _lines(run)
    notes, links = _notes(lines), {f"{_name(line)}.mp4": line for line in lines}
    if mode == "long":
        if any(0 < _seconds(line) < LONG_SECONDS for line in lines):
            notes.append(f"videos under {LONG_SECONDS:g} s: VBench's FAQ says VBench; mode custom is for that")
        return _write(run, out, name, dimensions, links, notes=notes, dev_flag=dev_flag)
    needing = [name for name in dimensions if name in PROMPT_DIMENSIONS]
    if needing and (nameless := [line.id for line in lines if not line.prompt]):
        raise ValueError(f"video {nameless[0]!r} has no prompt, and {needing[0]} reads it: leave that dimension out.")
    if any(_seconds(line) >= LONG_SECONDS for line in lines):
        notes.append(f"videos of {LONG_SECONDS:g} s and more: VBench's FAQ says VBench-Long; mode long is for that")
    prompts = {name: line.prompt for name, line in links.items()}
    return _write(run, out, name, dimensions, links, notes=notes, extra={"prompt_file.json": prompts})


def _export_standard(
    run: Path, out: Path, full_info: Path, dimensions: Sequence[str], *, num_samples: int, allow_missing: bool
) -> Export:
    prompts = _read_full_info(full_info)
    lines, links, missing = _lines(run), {}, []
    found = {(line.prompt, line.seed_index): line for line in lines}
    if strange := sorted({line.prompt for line in lines} - prompts.keys()):
        raise ValueError(f"{len(strange)} prompts of the run are not in {full_info.name}, e.g. {strange[0][:80]!r}.")
    for prompt, members in prompts.items():
        folders = sorted({FOLDERS.get(name, name) for name in members if name in dimensions})
        for sample in range(num_samples if folders else 0):
            name = f"{prompt}-{sample}.mp4"
            if "/" in name or "\0" in name or len(name.encode()) > MAX_NAME_BYTES:
                raise ValueError(f"{name[:60]!r}... cannot be a file name (no '/', at most {MAX_NAME_BYTES} bytes).")
            if (line := found.get((prompt, sample))) is None:
                missing.append(name)
                continue
            links.update({f"{folder}/{name}": line for folder in folders})
    if missing and not (allow_missing and links):
        raise ValueError(
            f"{len(missing)} videos of {', '.join(dimensions[:3])}... are not in the run, e.g. {missing[0]!r}: "
            "generate them, or choose fewer dimensions, or allow missing ones and compare with nobody."
        )
    notes = _notes(lines)
    if missing:
        notes.append(f"{len(missing)} videos are missing: not comparable with published numbers")
    if "temporal_flickering" in dimensions:
        notes.append("VBench takes 25 samples per prompt for temporal_flickering, and filters static videos first")
    info = json.loads(full_info.read_text(encoding="utf-8"))
    return _write(
        run, out, _MODES["standard"][2], dimensions, links, notes=notes, extra={"VBench_full_info.json": info}
    )


def _check_dimensions(dimensions: Sequence[str], allowed: Sequence[str], *, mode: str) -> None:
    for name in dimensions:
        if name not in DIMENSIONS:
            raise ValueError(
                f"unknown dimension {name!r}; known: {', '.join(DIMENSIONS)}.{did_you_mean(name, DIMENSIONS)}"
            )
        if name not in allowed:
            raise ValueError(f"dimension {name!r} is not scored in mode {mode}: use {', '.join(allowed)}.")
    if not dimensions or len(set(dimensions)) < len(dimensions):
        raise ValueError(f"dimensions={list(dimensions)}: name one or more, each once.")


def _read_full_info(path: Path) -> dict[str, tuple[str, ...]]:
    """{prompt: the dimensions it belongs to} of VBench's list of prompts, in its order."""
    try:
        prompts: dict[str, tuple[str, ...]] = {}
        for entry in json.loads(path.read_text(encoding="utf-8")):
            prompts[entry["prompt_en"]] = (*prompts.get(entry["prompt_en"], ()), *entry["dimension"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"cannot read VBench's list of prompts from {path}: {error!r}") from error
    return prompts


def _lines(run: Path) -> list[ManifestLine]:
    lines = read_manifest(run / "manifest.jsonl")
    if not lines:
        raise ValueError(f"{run} has no videos: generate some first.")
    names: dict[str, str] = {}
    for line in lines:
        path = run / line.file
        if path.suffix != ".mp4" or not path.is_file():
            raise ValueError(f"video {line.id!r} at {path} is no .mp4 file: the official tool reads no other.")
        if (other := names.setdefault(_name(line), line.id)) != line.id:
            raise ValueError(
                f"videos {other!r} and {line.id!r} have the same prompt and seed index: give each its own."
            )
    return lines


def _name(line: ManifestLine) -> str:
    """Without an underscore, at which VBench-Long cuts names and then finds no clip-to-clip term."""
    return f"p{line.prompt_index:04d}-{line.seed_index}"


def _seconds(line: ManifestLine) -> float:
    return line.num_frames / line.fps if line.fps else 0.0


def _notes(lines: Sequence[ManifestLine]) -> list[str]:
    rates = [line.encoder["crf"] for line in lines if line.encoder.get("crf") is not None]
    if len(rates) < len(lines):
        return [
            "the manifest does not say how all videos were encoded: lossy codecs move flickering and imaging quality"
        ]
    worst = max(rates)
    return [f"videos are encoded at crf {worst}: use {MAX_CRF} or less for evaluation"] if worst > MAX_CRF else []


def _write(
    run: Path,
    out: Path,
    mode: str,
    dimensions: Sequence[str],
    links: Mapping[str, ManifestLine],
    *,
    notes: list[str],
    dev_flag: bool | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Export:
    """Make the folder beside its place and move it there whole."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty: VBench uses clips again that it finds, so give a new folder.")
    place = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    place.mkdir(parents=True)
    try:
        copied = sum(_link(run / line.file, place / "videos" / name) for name, line in links.items())
        if copied:
            notes = [*notes, f"{copied} of {len(links)} videos are copies: this disk takes no hard links to them"]
        export = Export(
            mode=mode,
            dimensions=tuple(dimensions),
            dev_flag=dev_flag,
            commit=COMMIT,
            files={name: line.id for name, line in sorted(links.items())},
            notes=tuple(notes),
        )
        for name, content in {**(extra or {}), EXPORT_FILE: asdict(export)}.items():
            write_json(place / name, content)
        for name, text in _texts(export).items():
            write_atomically(place / name, text)
        (place / "run.sh").chmod(0o755)
        place.replace(out)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    return export


def _texts(export: Export) -> dict[str, str]:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("longtake.evaluation", "vbench_export")
    environment = Environment(
        loader=loader, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True, autoescape=False
    )
    facts = {
        "mode": export.mode,
        "commit": export.commit,
        "dev_flag": json.dumps(export.dev_flag),
        "folders": {name: FOLDERS.get(name, name) for name in export.dimensions},
        "notes": export.notes,
        "borrows": export.mode == "vbench_standard" and any(name in FOLDERS for name in export.dimensions),
    }
    return {name: environment.get_template(f"{name}.j2").render(facts) for name in ("README.md", "run.sh")}


def _link(source: Path, target: Path) -> bool:
    target.parent.mkdir(parents=True, exist_ok=True)
    source = source.resolve()
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
        return True
    return False


TOLERANCE = 1e-6
_CLIPS = "split_clip"
_VALUE_KEYS = ("video_results", "cor_num_per_video", "cur_success_frame_rate", "cur_sim")
_WEIGHT_KEYS = ("cnt_per_video", "frame_count")


@dataclass(frozen=True, kw_only=True)
class _Entry:
    video: str  # stem of the scored video's file
    clip: str  # of the clip's file; empty for whole videos
    value: float  # as the tool has it per video: imaging quality 0..100
    weight: float | None = None  # frames behind the value where the tool says so


@dataclass(frozen=True, kw_only=True)
class Imported:
    """One dimension's official result."""

    dimension: str  # as VBench spells it
    variant: Variant  # whole videos, or VBench-Long's clips without and with its development flag
    official_score: float  # the tool's first number, 0..1, which its totals are made of
    entries: tuple[_Entry, ...]  # behind it
    file: str  # name of the file it was read from
    commit: str | None = None  # of the official repository, where the run recorded it
    notes: tuple[str, ...] = ()  # for a reader of the score

    @property
    def metric(self) -> str:
        return member_name(self.dimension, self.variant)

    def __str__(self) -> str:
        what = "clips" if self.entries[0].clip else "videos"
        notes = "".join(f"; {note}" for note in self.notes)
        return f"{self.official_score:.4f} over {len(self.entries)} {what}, official VBench ({self.file}){notes}"


def import_results(files: Sequence[Path], *, dev_flag: bool | None = None) -> dict[str, Imported]:
    """Read results of the official tool, short and long, of one or many dimensions.

    Args:
        files: ``*_eval_results.json``. Whether VBench-Long's ``--dev_flag`` was set is read from the
            ``run_info.json`` beside each, else from the numbers themselves.
        dev_flag: Says so where neither does.

    Returns:
        {metric name: result}, ``vbench/DIMENSION``, ``vbench/long/...`` or ``vbench/long_dev/...``.

    Raises:
        ValueError: If a file is none of the tool's results, or its scale or flag cannot be told.
    """
    results: dict[str, Imported] = {}
    for path in files:
        info = _run_info(path.with_name("run_info.json"))
        for key, content in _results_file(path).items():
            dimension = key.strip().replace(" ", "_")
            where = f"{path.name}, {key!r}"
            if dimension not in DIMENSIONS:
                raise ValueError(f"{where}: unknown dimension.{did_you_mean(dimension, DIMENSIONS)}")
            result = _result(dimension, content, where, file=path.name, info=info, dev_flag=dev_flag)
            if (other := results.setdefault(result.metric, result)) is not result:
                raise ValueError(f"{where}: {result.metric} comes from {other.file} too: give one of the two.")
    if not results:
        raise ValueError("no results to import: give one or more *_eval_results.json.")
    return results


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read VBench results from {path}: {error}") from error


def _results_file(path: Path) -> Mapping[str, Any]:
    content = _read_json(path)
    if isinstance(content, list):
        raise ValueError(f"{path.name} is the tool's list of videos: give the *_eval_results.json beside it.")
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path.name} holds no results: expected a mapping of dimensions.")
    return content


def _run_info(path: Path) -> Mapping[str, Any]:
    content = _read_json(path) if path.is_file() else {}
    if not isinstance(content, dict) or content.get("dev_flag") not in (True, False, None):
        raise ValueError(f"{path} must say dev_flag true, false or null.")
    return content


def _result(
    dimension: str, content: Any, where: str, *, file: str, info: Mapping[str, Any], dev_flag: bool | None
) -> Imported:
    if not isinstance(content, list) or len(content) not in (2, 3) or not isinstance(content[1], list):
        raise ValueError(f"{where}: expected [score, values per video] or [score, per clip, per video].")
    score, rows = _number(content[0], f"{where}: the score"), content[1]
    if not rows or not all(isinstance(row, dict) and isinstance(row.get("video_path"), str) for row in rows):
        raise ValueError(f"{where}: needs one or more values, each with its video_path.")
    is_long = len(content) == 3 or any("clip2clip_score" in row or _CLIPS in _parts(row) for row in rows)
    entries = tuple(_entry(row, is_long, where) for row in rows)
    if dimension == "imaging_quality":
        score, entries = _imaging(score, entries, where)
    variant: Variant = "long" if is_long else "short"
    if is_long and dimension in DEV_DIMENSIONS:
        said = info.get("dev_flag") if dev_flag is None else dev_flag
        variant = "long_dev" if _dev_flag(rows, said, where) else "long"
    if not -1.001 <= score <= 1.001:
        raise ValueError(f"{where}: score {score:g} is outside -1..1.")
    return Imported(
        dimension=dimension,
        variant=variant,
        official_score=score,
        entries=entries,
        file=file,
        commit=info.get("commit"),
        notes=_missing_terms(rows) if variant == "long_dev" else (),
    )


def _number(value: Any, what: str) -> float:
    if not isinstance(value, bool | int | float) or not math.isfinite(value):
        raise ValueError(f"{what} is {value!r}, no finite number.")
    return float(value)


def _parts(row: Mapping[str, Any]) -> tuple[str, ...]:
    return PurePosixPath(row["video_path"].replace("\\", "/")).parts


def _entry(row: Mapping[str, Any], is_long: bool, where: str) -> _Entry:
    key = next((key for key in _VALUE_KEYS if key in row), None)
    if key is None:
        raise ValueError(f"{where}: {row['video_path']!r} has no {_VALUE_KEYS[0]}.")
    value = _number(row[key], f"{where}: {key} of {row['video_path']!r}")
    video, clip = _names(_parts(row), is_long)
    weight = next((_number(row[key], f"{where}: {key}") for key in _WEIGHT_KEYS if key in row), None)
    return _Entry(video=video, clip=clip, value=value, weight=weight)


def _names(parts: tuple[str, ...], is_long: bool) -> tuple[str, str]:
    """Stems of video and clip: ``.../split_clip/VIDEO/VIDEO_000.mp4``, and in fused results one folder more."""
    stem = PurePosixPath(parts[-1]).stem
    if not is_long:
        return stem, ""
    if _CLIPS in parts and len(parts) > (at := parts.index(_CLIPS)) + 2:
        return parts[at + 1], PurePosixPath(parts[at + 2]).stem
    head, _, tail = stem.rpartition("_")
    return (head, stem) if head and (tail.isdigit() or tail == "full") else (stem, stem)


def _imaging(score: float, entries: tuple[_Entry, ...], where: str) -> tuple[float, tuple[_Entry, ...]]:
    """The tool gives 0..100 per video and a hundredth of it as score; repackaged results may be all the same."""
    mean = sum(entry.value for entry in entries) / len(entries)
    for score_scale, value_scale in ((1.0, 1.0), (0.01, 1.0), (1.0, 100.0)):
        own, expected = score * score_scale, mean * value_scale / 100
        if 0 <= own <= 1 and abs(own - expected) <= 1e-4 and mean * value_scale > 1:
            return own, tuple(replace(entry, value=entry.value * value_scale) for entry in entries)
    raise ValueError(
        f"{where}: score {score:g} and mean {mean:g} of its videos do not fit: expected 0..100 per video and a "
        "hundredth of their mean as score."
    )


def _dev_flag(rows: Sequence[Mapping[str, Any]], said: bool | None, where: str) -> bool:
    """Tell if fused scores are half clip-to-clip; the numbers decide, and contradict what was said if they must."""
    seen: set[bool] = set()
    for row in rows:
        if "clip2clip_score" not in row:
            continue
        inside, between = float(row["inclip_score"]), float(row["mapped_clip2clip_score"])
        fits = {False: inside, True: 0.5 * (inside + between) if between != 0 else inside}
        matching = {flag for flag, value in fits.items() if abs(value - float(row["video_results"])) <= TOLERANCE}
        if not matching:
            raise ValueError(
                f"{where}: weights other than VBench-Long's 1/0 and 0.5/0.5; such a score has no name here."
            )
        seen |= matching if len(matching) == 1 else set()
    if len(seen) > 1 or (seen and said is not None and said not in seen):
        raise ValueError(f"{where}: says dev_flag={said}, and the numbers do not: results of two runs are mixed.")
    if not seen and said is None:
        raise ValueError(f"{where}: --dev_flag or not cannot be told from these numbers: say dev_flag=True or False.")
    return next(iter(seen)) if seen else bool(said)


def _missing_terms(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    count = sum(row.get("mapped_clip2clip_score", 0) == 0 for row in rows)
    reason = "an underscore in the name, a hard cut, or no 2nd clip"
    return (f"no clip-to-clip term for {count} of {len(rows)} clips: {reason}",) if count else ()


PROVENANCE = "imported: official VBench"
CLIP_SECONDS = 2.0
NOT_SCORED = "not in the official results that were imported"
AGREES = 1e-4  # difference up to which a mean of videos is the official score: frames per video may differ a little


def merge_imported(run: RunScores, results: Mapping[str, Imported]) -> RunScores:
    """Add official results to a run; they replace what the run measured under the same names.

    Args:
        run: Whose videos were scored, under their ids, as ``p0007-0`` or as ``PROMPT-0``.
        results: Of :func:`import_results`.

    Returns:
        The run with the metrics, ``imported: official VBench`` among the details of every score and the official
        scores in its header. A video that the results do not hold has no value and says so. VBench-Long's clips of
        two seconds become the windows of a curve.

    Raises:
        ValueError: If a result is of a video that the run does not have, or of one video twice.
    """
    names = _line_names([video.video for video in run.videos])
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


def _line_names(lines: Sequence[ManifestLine]) -> dict[str, int]:
    """{file stem a video may have been scored under: its index}; stems of two videos are none of either."""
    found: dict[str, set[int]] = defaultdict(set)
    for index, line in enumerate(lines):
        for stem in (line.id, _name(line), f"{line.prompt}-{line.seed_index}"):
            found[stem].add(index)
    return {stem: next(iter(indices)) for stem, indices in found.items() if len(indices) == 1}


def _by_video(result: Imported, names: Mapping[str, int]) -> dict[int, list[_Entry]]:
    unknown = sorted({entry.video for entry in result.entries} - names.keys())
    if unknown:
        raise ValueError(
            f"{result.file}: {len(unknown)} videos of {result.dimension} are not in this run, e.g. {unknown[0]!r}: "
            "import results of this run's own export."
        )
    grouped: dict[int, dict[str, _Entry]] = defaultdict(dict)
    for entry in result.entries:
        own = grouped[names[entry.video]]
        if entry.clip in own:
            raise ValueError(f"{result.file}: {result.dimension} of {entry.clip or entry.video!r} stands there twice.")
        own[entry.clip] = entry
    return {index: [own[clip] for clip in sorted(own)] for index, own in grouped.items()}


def _score(result: Imported, entries: Sequence[_Entry], line: ManifestLine) -> Score:
    if not entries:
        return Score.none(NOT_SCORED)
    values = [entry.value for entry in entries]
    if result.variant == "short":
        weight = entries[0].weight or _frame_weight(result, line)
        return Score(value=values[0], weight=weight, details={"provenance": PROVENANCE})
    return Score(
        value=sum(values) / len(values),
        weight=float(len(values)),
        windows=_windows(values, line),
        details={"provenance": PROVENANCE, "clips": values},
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
    present = [(score.value, score.weight) for score in scores if score.value is not None]
    mean = spec.scale * sum(value * weight for value, weight in present) / sum(weight for _, weight in present)
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


def write_imported(folder: Path, results: Mapping[str, Imported]) -> Path:
    """Keep official results, which merge, in a run's folder; metrics kept there before stay unless they come again."""
    kept = {**read_imported(folder), **results}
    path = folder / IMPORTED_FILE
    write_json(path, {name: asdict(result) for name, result in kept.items()})
    return path


def read_imported(folder: Path) -> dict[str, Imported]:
    """Official results that were kept in a run's folder, {metric name: result}."""
    from pydantic import TypeAdapter

    path = folder / IMPORTED_FILE
    if not path.is_file():
        return {}
    try:
        return TypeAdapter(dict[str, Imported]).validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}: delete it and import again.") from error
