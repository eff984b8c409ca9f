"""Units of work of an evaluation, which the protocol alone decides, and which of them are finished.

A unit is one batch of videos of one policy, or one existing video. Which process does it, when, and after how many
interruptions changes nothing about its numbers.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longtake.evaluation.metric import Segment
from longtake.evaluation.records import ManifestLine, score_name
from longtake.evaluation.running.protocol import Protocol
from longtake.evaluation.running.suites import Prompt, video_seed

MANIFEST = "manifest.jsonl"
SCORES = "scores"
UNITS = "units"
VIDEOS = "videos"


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Videos that are made together, or one that exists.

    Attributes:
        label: Of the run.
        number: Within the run, from 0.
        share: Which process it falls to is this modulo their number.
        folder: Of the run.
        lines: One per video; what only the finished video tells is filled in when it is there.
        prompts: What to generate from; empty for a video that exists.
    """

    label: str
    number: int
    share: int
    folder: Path
    lines: tuple[ManifestLine, ...]
    prompts: tuple[Prompt, ...] = ()

    @property
    def title(self) -> str:
        """Name for messages."""
        return f"{self.label}, videos {self.lines[0].id} to {self.lines[-1].id}"

    @property
    def is_generated(self) -> bool:
        """Tell whether the unit makes its videos."""
        return bool(self.prompts)

    @property
    def num_steps(self) -> int:
        """For progress: one per video made and one per video measured."""
        return len(self.lines) * (2 if self.is_generated else 1)

    @property
    def record_path(self) -> Path:
        """File that says that the videos of a generated unit are whole."""
        return self.folder / UNITS / f"{self.number:05d}.json"

    def score_path(self, line: ManifestLine) -> Path:
        """File of a video's scores."""
        return self.folder / SCORES / score_name(line.id)

    def finished_lines(self) -> tuple[ManifestLine, ...]:
        """The videos' lines, as their record has them; empty while they are not whole."""
        if not self.is_generated:
            return self.lines
        record = read_json(self.record_path)
        if record is None:
            return ()
        return tuple(ManifestLine.from_json(values) for values in record["lines"])

    def videos_exist(self, lines: Sequence[ManifestLine]) -> bool:
        """Tell whether every video's file is there."""
        return bool(lines) and all((self.folder / line.file).exists() for line in lines)

    def is_measured(self, line: ManifestLine) -> bool:
        """Tell whether the scores of this very video are there."""
        values = read_json(self.score_path(line))
        # Through JSON, so that tuples and lists are the same.
        return values is not None and values["video"] == json.loads(json.dumps(line.to_json()))

    def is_done(self, *, keep_videos: bool) -> bool:
        """Tell whether nothing is left to do."""
        lines = self.finished_lines()
        if not lines or not all(self.is_measured(line) for line in lines):
            return False
        return not (self.is_generated and keep_videos) or self.videos_exist(lines)


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """One run: a policy's videos, or a folder of them.

    Attributes:
        label: Of the run.
        folder: Where its manifest, scores and results go.
        policy: Settings of the cache policy, and of ``attention`` where it is sparse, if they are known.
        units: In order.
    """

    label: str
    folder: Path
    policy: Mapping[str, Any] = field(default_factory=dict)
    units: tuple[Unit, ...] = ()


def plan_generation(protocol: Protocol, prompts: Sequence[Prompt], out: Path) -> list[RunPlan]:
    """Cut every policy's videos into batches, all prompts of one seed first.

    Only videos whose prompts change at the same times can be made together. No video is left out because it does
    not fill a batch.

    Args:
        protocol: Resolved.
        prompts: The list it names.
        out: Folder of the evaluation.
    """
    groups: dict[tuple[float, ...], list[tuple[int, int]]] = {}
    for seed in range(protocol.samples):
        for index, prompt in enumerate(prompts):
            groups.setdefault(tuple(change.start_s for change in prompt.changes), []).append((index, seed))
    size = protocol.batch
    batches = [videos[start : start + size] for videos in groups.values() for start in range(0, len(videos), size)]
    runs = []
    for position, (label, policy) in enumerate((protocol.caches or {}).items()):
        folder = out / label
        units = tuple(
            Unit(
                label=label,
                number=number,
                # Neighbours in a row of policies and in a row of batches fall to different processes.
                share=number + position,
                folder=folder,
                lines=tuple(_planned(protocol, label, prompts[prompt], prompt, seed) for prompt, seed in batch),
                prompts=tuple(prompts[prompt] for prompt, _ in batch),
            )
            for number, batch in enumerate(batches)
        )
        runs.append(RunPlan(label=label, folder=folder, policy=policy, units=units))
    return runs


def interleaved(runs: Sequence[RunPlan]) -> list[Unit]:
    """All units, policy after policy within every batch: stopped early, the policies have seen the same prompts."""
    units = (unit for run in runs for unit in run.units)
    order = {run.label: position for position, run in enumerate(runs)}
    return sorted(units, key=lambda unit: (unit.number, order[unit.label]))


def read_json(path: Path) -> Any:
    """Read a file that is written whole or not at all; None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): delete it, and its video is measured again") from error


def _planned(protocol: Protocol, label: str, prompt: Prompt, prompt_index: int, seed_index: int) -> ManifestLine:
    # No underscore, at which the official VBench stumbles, and no prompt.
    name = f"p{prompt_index:04d}-{seed_index}"
    return ManifestLine(
        id=name,
        file=f"{VIDEOS}/{name}.mp4",
        prompt=prompt.text,
        prompt_index=prompt_index,
        seed_index=seed_index,
        seed=video_seed(prompt_index, seed_index),
        policy=label,
        prompt_extended=prompt.extended,
        segments=_segments(prompt, protocol.seconds),
        dimensions=prompt.dimensions,
        config_hash=protocol.config_hash(label),
        checkpoint=f"{protocol.family} {(protocol.model_sha256 or '')[:16]}",
    )


def _segments(prompt: Prompt, seconds: float) -> tuple[Segment, ...]:
    """Segments as they are wished for; a change takes effect at the next block's start."""
    if not prompt.changes:
        return ()
    starts = [0.0, *(change.start_s for change in prompt.changes), seconds]
    return tuple(
        Segment(start_s=start, end_s=end, prompt=part.text)
        for start, end, part in zip(starts, starts[1:], (prompt, *prompt.changes), strict=False)
    )
