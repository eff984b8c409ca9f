"""Compare this installation with numbers that VBench's own code gave with stand-in networks.

A folder of golden numbers holds ``golden.json``, ``videos/NAME.mp4`` and, as backbones, ``stubs.py``.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from longtake.evaluation.backbones import Backbones
from longtake.evaluation.metric import Score
from longtake.evaluation.metrics import make_metrics
from longtake.evaluation.metrics.dimensions import DIMENSIONS, fused, mapped_clip_to_clip
from longtake.evaluation.metrics.vbench import SpanMetric
from longtake.evaluation.preprocessing import clip_ranges, middle
from longtake.evaluation.records import ManifestLine
from longtake.evaluation.running.plan import prompt_of_name, video_info
from longtake.evaluation.scores import TOTALS
from longtake.evaluation.video import VideoSource, measure

TOLERANCE = 1e-6  # absolute, for every number; counts, indices and booleans are exact
_MUSIQ_MODES = ("shorter", "shorter_centercrop", "None")


class _Check(NamedTuple):
    name: str
    expected: Any  # as VBench's own code gave it
    got: Any  # as computed here, None if it could not be
    error: float  # absolute difference; infinite where something exact is not equal, or could not be computed

    @property
    def ok(self) -> bool:
        return self.error <= TOLERANCE


def check_golden(folder: Path, backbones: Backbones) -> list[_Check]:
    """Compute every golden number of a folder that is measured here, with the stand-ins of its ``stubs.py``."""
    path = folder / "golden.json"
    try:
        golden = json.loads(path.read_text(encoding="utf-8"))
        videos = _videos(folder, golden.get("videos", {}), backbones)
        checks = [*videos, *_numbers(golden)]
    except (OSError, AttributeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as golden numbers: {error!r}") from error
    if not checks:
        raise ValueError(f"{folder} holds no golden numbers: give a folder with golden.json and videos/.")
    return checks


def _golden_scores(scores: Mapping[str, Score], folder: str = "") -> dict[str, Score]:
    """{dimension: score} of the metrics ``vbench/FOLDER...`` and ``vbench_form/FOLDER...[...]``."""
    stems = {name.partition("/")[2].partition("[")[0]: score for name, score in scores.items()}
    return {name: stems[folder + name] for name in DIMENSIONS if folder + name in stems}


def _near(name: str, expected: float, got: float | None) -> _Check:
    return _Check(name, expected, got, math.inf if got is None else abs(got - expected))


def _equal(name: str, expected: Any, got: Any) -> _Check:
    return _Check(name, expected, got, 0.0 if got == expected else math.inf)


def _videos(folder: Path, golden: Mapping[str, Any], backbones: Backbones) -> Iterator[_Check]:
    metrics, _ = make_metrics(backbones, groups=("vbench",))
    scorer = backbones.get("musiq")
    for name, expected in golden.items():
        path = folder / "videos" / f"{name}.mp4"
        if not path.exists():
            continue
        source = VideoSource.open(path)
        pixels = hashlib.sha256()
        for frames in source.pieces():
            pixels.update(frames.tobytes())
        yield _equal(f"{name}: decoded bytes", expected["sha256_rgb"], pixels.hexdigest())
        info = video_info(ManifestLine(id=name, file=path.name, prompt=expected["prompt"]), source)
        scores = _golden_scores(measure(source, info, metrics))
        for dimension in DIMENSIONS:
            yield from _dimension(f"{name}: {dimension}", dimension, expected, scores.get(dimension))
        for mode in _MUSIQ_MODES if scorer is not None else ():
            metric = SpanMetric("imaging_quality", ("short",), [scorer], mode=mode)
            value = _golden_scores(measure(source, info, [metric]))["imaging_quality"].value
            yield _near(f"{name}: imaging_quality, {mode}", expected["imaging_quality_raw_0_100"][mode], value)


def _dimension(name: str, dimension: str, golden: Mapping[str, Any], score: Score | None) -> Iterator[_Check]:
    value = None if score is None else score.value
    if dimension == "imaging_quality":
        yield _near(f"{name}, longer", golden["imaging_quality_raw_0_100"]["longer"], value)
        return
    if dimension != "dynamic_degree":
        yield _near(name, golden[dimension], value)
        return
    details = {} if score is None else score.details
    for key, expected in golden[dimension].items():
        got = details.get(key)
        if key == "pair_scores_first5":
            for index, item in enumerate(expected):
                yield _near(f"{name}, pair {index}", item, None if got is None else got[index])
        else:
            yield (_near if isinstance(expected, float) else _equal)(f"{name}, {key}", expected, got)


def _numbers(golden: Mapping[str, Any]) -> Iterator[_Check]:
    """Sampled frames, clips, prompts, scores and fusions."""
    for case, expected in golden.get("get_frame_indices_middle", {}).items():
        num, length = (int(part.partition("=")[2]) for part in case.split(","))
        yield _equal(f"middle frames, {case}", expected, middle(num, length))
    for video, clips in golden.get("split_video_into_clips_2s [start_frame, n_frames]", {}).items():
        expected = [tuple(clip) for _, clip in sorted(clips.items())]
        num_frames = expected[-1][0] + expected[-1][1]
        # A clip of the whole video does not tell the rate; the only one there is has 16 frames a second.
        fps = 16 if any(name.endswith("_full.mp4") for name in clips) else expected[0][1] / 2
        yield _equal(f"clips of {video}", expected, clip_ranges(num_frames, fps, 2))
    for name, expected in golden.get("get_prompt_from_filename_short", {}).items():
        yield _equal(f"prompt of {name}", expected, prompt_of_name(Path(name).stem)[0])
    if expected := golden.get("total_score"):
        values = {f"vbench/{name.replace(' ', '_')}": value for name, value in expected["raw"].items()}
        for name, score in {"quality": "quality7", "semantic": "semantic", "total": "total"}.items():
            yield _near(f"score: {name}", expected[name], TOTALS[score](values)[0])
    for example in golden.get("fuse_examples", []):
        dimension, inclip, between = example["dimension"], example["inclip_score"], example["clip2clip_score"]
        name = f"fusion of {inclip} and {between}, {dimension}"
        yield _near(f"{name}: mapped", example["mapped_clip2clip_score"], mapped_clip_to_clip(between, dimension))
        yield _near(f"{name}: fused", example["video_results"], fused(inclip, between, dimension))
