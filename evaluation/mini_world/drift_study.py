"""The drift study's run: many videos per cache policy, measured while they stream, one JSON line per finished video.

A killed study loses at most the batch it was in; started again, it goes on with the videos that are missing.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.evaluation.mini_world.drift import MEASURES, WINDOW_FRAMES, WindowMeter
from longtake.evaluation.mini_world.judge import ClipJudge
from longtake.evaluation.mini_world.moving_scenes import Scene, describe
from longtake.evaluation.running.suites import video_seed

StreamFrames = Callable[[list[str], list[int], Any], Iterable[Tensor]]
"""(prompts, seeds, cache) -> tensors (batch, F, 3, H, W) in [0, 1], in order."""

COSTS = ("ms_per_block", "kv_mb")
"""Measured beside the drift measures where a ``CostMeter`` is given: denoising milliseconds per block and video, and
megabytes of keys and values per video, read sets and guidance branches included."""


class CostMeter:
    """What a stream's blocks cost, by the window of video they end in; the stream adds to it before it yields."""

    def __init__(self) -> None:
        self._num_frames = 0
        self._blocks: list[tuple[int, float, float]] = []

    def add(self, *, num_frames: int, seconds: float, num_bytes: float) -> None:
        """Note a block.

        Args:
            num_frames: pixel frames it adds to each video.
            seconds: of denoising, per video of the batch.
            num_bytes: of keys and values after it, per video of the batch.
        """
        self._num_frames += num_frames
        self._blocks.append(((self._num_frames - 1) // WINDOW_FRAMES, seconds, num_bytes))

    def take(self, num_windows: int) -> list[dict[str, float]]:
        """Costs per window, NaN where no block ended; empties the meter."""
        rows = []
        for window in range(num_windows):
            own = [(seconds, size) for index, seconds, size in self._blocks if index == window]
            mean = 1e3 * sum(seconds for seconds, _ in own) / len(own) if own else float("nan")
            rows.append({"ms_per_block": mean, "kv_mb": own[-1][1] / 1e6 if own else float("nan")})
        self._num_frames = 0
        self._blocks.clear()
        return rows


@dataclass(frozen=True, kw_only=True)
class VideoResult:
    """What was measured on one video.

    Attributes:
        policy: label of the cache policy.
        prompt_index: of the held-back scene the prompt was taken from.
        seed_index: 0, 1, ...
        prompt: the caption.
        fingerprint: what the video depends on beside prompt and seed; results with different ones do not mix.
        windows: {measure: value} per five-second window; NaN where a measure does not apply.
    """

    policy: str
    prompt_index: int
    seed_index: int
    prompt: str
    fingerprint: str
    windows: tuple[dict[str, float], ...]

    def to_json(self) -> str:
        """One line; NaN is written as null."""
        windows = [
            {key: None if isnan(value) else round(value, 6) for key, value in row.items()} for row in self.windows
        ]
        return json.dumps({**self.__dict__, "windows": windows}, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> "VideoResult":
        """Inverse of :meth:`to_json`."""
        values = json.loads(line)
        windows = tuple(
            {key: float("nan") if value is None else value for key, value in row.items()} for row in values["windows"]
        )
        return cls(**{**values, "windows": windows})


def read_results(path: Path) -> list[VideoResult]:
    """Read finished videos; a last line that a kill cut short is not one.

    Args:
        path: JSON lines; a file that does not exist holds no results.
    """
    if not path.is_file():
        return []
    return [VideoResult.from_json(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def append_results(path: Path, results: Sequence[VideoResult]) -> None:
    """Append finished videos and see them on disk; drops a line that a kill cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.write("".join(f"{result.to_json()}\n" for result in results).encode())
        file.flush()
        os.fsync(file.fileno())


def study_fingerprint(modules: Iterable[torch.nn.Module], settings: Mapping[str, Any]) -> str:
    """Hash what a video depends on: every weight, and the settings as sorted JSON; 12 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode())
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def missing_videos(
    results: Sequence[VideoResult], *, policy: str, prompts: Sequence[int], num_seeds: int, fingerprint: str
) -> list[tuple[int, int]]:
    """List the (prompt index, seed index) that a policy has not finished, all prompts of one seed first.

    Raises:
        ValueError: If there are results of the policy with another fingerprint.
    """
    own = [result for result in results if result.policy == policy]
    strange = {result.fingerprint for result in own} - {fingerprint}
    if strange:
        raise ValueError(
            f"results of policy {policy!r} were made with {sorted(strange)[0]}, this study runs {fingerprint}: "
            "write to another folder, or delete them."
        )
    done = {(result.prompt_index, result.seed_index) for result in own}
    wanted = [(prompt, seed) for seed in range(num_seeds) for prompt in prompts]
    return [video for video in wanted if video not in done]


def measure_stream(
    judge: ClipJudge, scenes: Sequence[Scene], stream: Iterable[Tensor]
) -> list[list[dict[str, float]]]:
    """Measure a batch of videos as they stream.

    Args:
        judge: from :func:`longtake.evaluation.mini_world.judge.load_judge`.
        scenes: one per video.
        stream: (batch, F, 3, H, W) in [0, 1], in order.

    Returns:
        Per video its windows.
    """
    meter = WindowMeter(judge, scenes)
    windows = [window for frames in stream for window in meter.push(frames)]
    return [list(video) for video in zip(*windows, strict=True)]


@torch.inference_mode()
def run_study(
    stream_frames: StreamFrames,
    judge: ClipJudge,
    *,
    scenes: Sequence[Scene],
    policies: dict[str, Any],
    num_seeds: int,
    batch_size: int,
    fingerprints: dict[str, str],
    path: Path,
    prompts: Sequence[int] | None = None,
    costs: CostMeter | None = None,
) -> Iterator[list[VideoResult]]:
    """Run what is missing of a study, policy by policy within every batch of prompts.

    Stopped at any moment, the policies have been measured on nearly the same videos, so their differences stay
    paired.

    Args:
        stream_frames: makes videos.
        judge: the classifier.
        scenes: prompts are their captions.
        policies: {label: cache, as the pipeline takes it}.
        num_seeds: videos per prompt and policy.
        batch_size: videos made together.
        fingerprints: {label: what the videos depend on beside prompt and seed}.
        path: JSON lines to append to.
        prompts: indices into ``scenes`` this run takes care of, all of them unless given; runs that share a study
            write to files of their own.
        costs: what ``stream_frames`` notes its blocks' costs in, if it does.

    Yields:
        The results of every finished batch, already on disk.

    Raises:
        ValueError: If ``path`` holds results of another study.
    """
    results = read_results(path)
    prompts = range(len(scenes)) if prompts is None else prompts
    queues = {
        label: missing_videos(
            results, policy=label, prompts=prompts, num_seeds=num_seeds, fingerprint=fingerprints[label]
        )
        for label in policies
    }
    while any(queues.values()):
        # The policy that is furthest behind goes first, so that a resumed study evens out.
        label = max(queues, key=lambda name: len(queues[name]))
        videos, queues[label] = queues[label][:batch_size], queues[label][batch_size:]
        chosen = [scenes[prompt] for prompt, _ in videos]
        captions = [describe(scene) for scene in chosen]
        seeds = [video_seed(prompt, seed) for prompt, seed in videos]
        measured = measure_stream(judge, chosen, stream_frames(captions, seeds, policies[label]))
        spent = costs.take(len(measured[0])) if costs is not None else [{} for _ in measured[0]]
        finished = [
            VideoResult(
                policy=label,
                prompt_index=prompt,
                seed_index=seed,
                prompt=caption,
                fingerprint=fingerprints[label],
                windows=tuple(row | cost for row, cost in zip(windows, spent, strict=True)),
            )
            for (prompt, seed), caption, windows in zip(videos, captions, measured, strict=True)
        ]
        append_results(path, finished)
        yield finished


def window_values(results: Sequence[VideoResult], measure: str, window: int) -> dict[tuple[int, int], float]:
    """{(prompt index, seed index): value} of one measure in one window, for one policy's results.

    Raises:
        ValueError: If the measure is unknown.
    """
    if measure not in (*MEASURES, *COSTS):
        raise ValueError(f"unknown measure {measure!r}: known are {', '.join((*MEASURES, *COSTS))}.")
    return {
        (result.prompt_index, result.seed_index): result.windows[window].get(measure, float("nan"))
        for result in results
        if window < len(result.windows)
    }
