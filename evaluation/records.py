"""Records of an evaluation: a manifest line and a score file per video, and the results of a run (schema 1)."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from longtake.evaluation.metric import MetricSpec, Score, Segment, Window

SCHEMA = 1
MANIFEST = "manifest.jsonl"
SCORES = "scores"
COMPARISON_FILE = "comparison.json"
REPORT_FILE = "report.html"
NUM_SHOWN_PROMPTS = 3  # the report shows frames of so many prompts: the first ones, their first seed
_OTHER_NAMES = {"n_frames": "num_frames", "H": "height", "W": "width"}
_LONGEST_NAME = 255 - len(".json")  # bytes of a file's name that file systems take


@dataclass(frozen=True, kw_only=True)
class ManifestLine:
    """Facts about one video: the text it was made from, how, and with what."""

    id: str  # unique within the run; the file name's stem. No underscore: the official VBench stumbles over it.
    file: str  # path of the video, relative to the manifest; empty: the one named after ``id``
    prompt: str = ""  # the text it is judged by
    prompt_index: int = 0  # of the prompt within its list; videos of one prompt are not independent
    seed_index: int = 0  # 0, 1, ... within the prompt.
    seed: int = 0  # of the noise
    policy: str = ""  # label of the cache policy; empty if unknown
    prompt_extended: str = ""  # the longer text it was generated from, if another
    segments: tuple[Segment, ...] = ()  # prompts over time
    config_hash: str = ""  # of everything the video depends on beside prompt and seed
    checkpoint: str = ""  # name and hash of the weights
    num_frames: int = 0
    fps: float = 0.0
    height: int = 0
    width: int = 0
    chunk_starts: tuple[int, ...] = ()  # first frame of each block
    encoder: Mapping[str, Any] = field(default_factory=dict)  # codec settings
    sha256: str = ""  # of the file; empty if unknown
    dimensions: tuple[str, ...] = ()  # of VBench, those that its list has this prompt for; empty: any

    @property
    def is_shown(self) -> bool:
        return self.prompt_index < NUM_SHOWN_PROMPTS and self.seed_index == 0

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        return values if self.dimensions else {name: value for name, value in values.items() if name != "dimensions"}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ManifestLine":
        """Inverse of :meth:`to_json`; ``n_frames``, ``H`` and ``W`` are understood, too."""
        values = {_OTHER_NAMES.get(name, name): value for name, value in values.items()}
        unknown = values.keys() - {item.name for item in fields(cls)}
        missing = {"id"} - values.keys()
        if unknown or missing:
            raise ValueError(
                f"manifest line {values.get('id', '?')!r}: unknown {sorted(unknown)}, missing {sorted(missing)}"
            )
        segments = tuple(Segment(**segment) for segment in values.get("segments", ()))
        tuples = {name: tuple(values.get(name, ())) for name in ("chunk_starts", "dimensions")}
        return cls(**{"file": "", **values, **tuples, "segments": segments})


@dataclass(frozen=True, kw_only=True)
class VideoScores:
    """Every metric on one video: the content of ``scores/ID.json``."""

    video: ManifestLine
    scores: Mapping[str, Score]

    def to_json(self) -> dict[str, Any]:
        scores = {name: asdict(score) for name, score in sorted(self.scores.items())}
        for score in scores.values():
            score["windows"] = [[w["start_frame"], w["num_frames"], w["value"]] for w in score["windows"]]
        return {"schema": SCHEMA, "video": self.video.to_json(), "scores": scores}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "VideoScores":
        scores = {}
        for name, score in values["scores"].items():
            windows = tuple(Window(start_frame=s, num_frames=n, value=v) for s, n, v in score["windows"])
            scores[name] = Score(**{**score, "windows": windows})
        return cls(video=ManifestLine.from_json(values["video"]), scores=scores)


@dataclass(frozen=True, kw_only=True)
class RunScores:
    """All videos of one run (one policy, or one folder of videos) with what the numbers mean."""

    label: str  # of the run, e.g. the policy.
    specs: Mapping[str, MetricSpec]  # {name: spec} of every metric that was asked for
    videos: Sequence[VideoScores]  # in the order of the manifest
    # Of the run: tool, protocol, model, command; JSON-able, free of times and paths.
    header: Mapping[str, Any] = field(default_factory=dict)
    # {metric name or dimension: why it was not computed at all}.
    skipped: Mapping[str, str] = field(default_factory=dict)
    # {name: value} such as ``ms_per_block``, ``kv_mb``, ``first_frame_s``; not part of ``results.json``.
    costs: Mapping[str, float] = field(default_factory=dict)

    def values(self, name: str) -> dict[tuple[int, int], float]:
        """{(prompt index, seed index): value} of one metric, videos without a value left out."""
        pairs = ((video.video, video.scores.get(name)) for video in self.videos)
        return {
            (line.prompt_index, line.seed_index): score.value
            for line, score in pairs
            if score is not None and score.value is not None
        }


def read_manifest(path: Path) -> list[ManifestLine]:
    """Read a manifest, one JSON object per line."""
    lines: list[ManifestLine] = []
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the manifest {path}: {error}") from error
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(ManifestLine.from_json(json.loads(text)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if repeated := sorted(name for name, count in Counter(line.id for line in lines).items() if count > 1):
        raise ValueError(f"{path} names {repeated[0]!r} more than once: ids must be unique")
    return lines


def write_manifest(path: Path, lines: Iterable[ManifestLine]) -> None:
    """Write a manifest; all of it or nothing."""
    write_atomically(path, "".join(json.dumps(line.to_json(), sort_keys=True) + "\n" for line in lines))


def read_json(path: Path) -> Any:
    """Read a file that is written whole or not at all; None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): delete it, and its video is measured again") from error


def write_json(path: Path, values: Any) -> None:
    """Write JSON that is the same bytes for the same values; all of it or nothing."""
    write_atomically(path, json.dumps(values, indent=1, sort_keys=True, allow_nan=False) + "\n")


def score_name(video_id: str) -> str:
    """File name of a video's scores; what would be too long for one ends in a hash."""
    text = video_id.encode()
    if len(text) <= _LONGEST_NAME:
        return f"{video_id}.json"
    return f"{text[: _LONGEST_NAME - 17].decode(errors='ignore')}-{_hash(video_id)}.json"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by a text and see it on disk; a kill leaves the old file or the new one.

    Raises:
        OSError: If it cannot be written, for example because the disk is full; the old file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the whole name, which may be as long as names can be.
    temporary = path.with_name(f".{_hash(path.name)}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
