"""The official VBench's ``*_eval_results.json`` read back: scores, their videos, and what is wrong with them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from longtake.configs.fields import did_you_mean
from longtake.evaluation.scores import DEV_DIMENSIONS, Variant, member_name
from longtake.evaluation.vbench_io.layout import DIMENSIONS

TOLERANCE = 1e-6
_CLIPS = "split_clip"
_VALUE_KEYS = ("video_results", "cor_num_per_video", "cur_success_frame_rate", "cur_sim")
_WEIGHT_KEYS = ("cnt_per_video", "frame_count")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One video, or one clip of VBench-Long.

    Attributes:
        video: Stem of the scored video's file.
        clip: Of the clip's file; empty for whole videos.
        value: As the tool has it per video: imaging quality 0..100.
        weight: Frames behind the value where the tool says so.
    """

    video: str
    clip: str
    value: float
    weight: float | None = None


@dataclass(frozen=True, kw_only=True)
class Imported:
    """One dimension's official result.

    Attributes:
        dimension: As VBench spells it.
        variant: Whole videos, or VBench-Long's clips without and with its development flag.
        official_score: The tool's first number, 0..1, which its totals are made of.
        entries: Behind it.
        file: Name of the file it was read from.
        commit: Of the official repository, where the run recorded it.
        notes: What a reader should know.
    """

    dimension: str
    variant: Variant
    official_score: float
    entries: tuple[Entry, ...]
    file: str
    commit: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def metric(self) -> str:
        """Name of the metric that it is."""
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
        ValueError: If a file cannot be read or is none of the tool's results, a dimension is unknown or comes twice,
            a value is missing or on a scale that cannot be told, or the flag cannot be.
    """
    results: dict[str, Imported] = {}
    for path in files:
        info = _run_info(path)
        for key, content in _read(path).items():
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


def official_values(results: Mapping[str, Imported]) -> dict[str, float]:
    """{metric name: the tool's own score}, which Quality, Semantic and Total are made of."""
    return {name: result.official_score for name, result in results.items()}


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read VBench results from {path}: {error}") from error
    if isinstance(content, list):
        raise ValueError(f"{path.name} is the tool's list of videos: give the *_eval_results.json beside it.")
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path.name} holds no results: expected a mapping of dimensions.")
    return content


def _run_info(path: Path) -> Mapping[str, Any]:
    info = path.with_name("run_info.json")
    if not info.is_file():
        return {}
    try:
        content = json.loads(info.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"cannot read {info}: {error}") from error
    if not isinstance(content, dict) or content.get("dev_flag") not in (True, False, None):
        raise ValueError(f"{info} must say dev_flag true, false or null.")
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
    notes: list[str] = []
    if dimension == "imaging_quality":
        score, entries = _imaging(score, entries, where)
    variant: Variant = "short"
    if is_long:
        variant = "long"
        if dimension in DEV_DIMENSIONS:
            said = info.get("dev_flag") if dev_flag is None else dev_flag
            variant = "long_dev" if _dev_flag(rows, said, where) else "long"
            notes.extend(_missing_terms(rows) if variant == "long_dev" else [])
    if not -1.001 <= score <= 1.001:
        raise ValueError(f"{where}: score {score:g} is outside -1..1.")
    return Imported(
        dimension=dimension,
        variant=variant,
        official_score=score,
        entries=entries,
        file=file,
        commit=info.get("commit"),
        notes=tuple(notes),
    )


def _number(value: Any, what: str) -> float:
    if not isinstance(value, bool | int | float) or value != value or value in (float("inf"), float("-inf")):
        raise ValueError(f"{what} is {value!r}, no finite number.")
    return float(value)


def _parts(row: Mapping[str, Any]) -> tuple[str, ...]:
    return PurePosixPath(row["video_path"].replace("\\", "/")).parts


def _entry(row: Mapping[str, Any], is_long: bool, where: str) -> Entry:
    key = next((key for key in _VALUE_KEYS if key in row), None)
    if key is None:
        raise ValueError(f"{where}: {row['video_path']!r} has no {_VALUE_KEYS[0]}.")
    value = _number(row[key], f"{where}: {key} of {row['video_path']!r}")
    video, clip = _names(_parts(row), is_long)
    weight = next((_number(row[key], f"{where}: {key}") for key in _WEIGHT_KEYS if key in row), None)
    return Entry(video=video, clip=clip, value=value, weight=weight)


def _names(parts: tuple[str, ...], is_long: bool) -> tuple[str, str]:
    """Stems of video and clip: ``.../split_clip/VIDEO/VIDEO_000.mp4``, and in fused results one folder more."""
    stem = PurePosixPath(parts[-1]).stem
    if not is_long:
        return stem, ""
    if _CLIPS in parts and len(parts) > (at := parts.index(_CLIPS)) + 2:
        return parts[at + 1], PurePosixPath(parts[at + 2]).stem
    head, _, tail = stem.rpartition("_")
    return (head, stem) if head and (tail.isdigit() or tail == "full") else (stem, stem)


def _imaging(score: float, entries: tuple[Entry, ...], where: str) -> tuple[float, tuple[Entry, ...]]:
    """The tool gives 0..100 per video and a hundredth of it as score; repackaged results may be all the same."""
    mean = sum(entry.value for entry in entries) / len(entries)
    for score_scale, value_scale in ((1.0, 1.0), (0.01, 1.0), (1.0, 100.0)):
        own, expected = score * score_scale, mean * value_scale / 100
        if 0 <= own <= 1 and abs(own - expected) <= 1e-4 and mean * value_scale > 1:
            values = (Entry(**{**vars(entry), "value": entry.value * value_scale}) for entry in entries)
            return own, tuple(values)
    raise ValueError(
        f"{where}: score {score:g} and mean {mean:g} of its videos do not fit: expected 0..100 per video and a "
        "hundredth of their mean as score."
    )


def _dev_flag(rows: Sequence[Mapping[str, Any]], said: bool | None, where: str) -> bool:
    """Whether fused scores are half clip-to-clip; the numbers decide, and contradict what was said if they must."""
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


def _missing_terms(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    count = sum(row.get("mapped_clip2clip_score", 0) == 0 for row in rows)
    if not count:
        return []
    return [
        f"no clip-to-clip term for {count} of {len(rows)} clips: an underscore in the name, a hard cut, or no 2nd clip"
    ]
