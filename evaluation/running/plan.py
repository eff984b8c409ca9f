"""Units of work of an evaluation, which the protocol and folders of videos alone decide, and which are finished.

A unit is one batch of videos of one policy, or one existing video. Which process does it, when, and after how many
interruptions changes nothing about its numbers.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from longtake.evaluation.metric import Segment, VideoInfo
from longtake.evaluation.records import MANIFEST, SCORES, ManifestLine, read_json, read_manifest, score_name
from longtake.evaluation.running.protocol import LABEL, Protocol
from longtake.evaluation.running.suites import Prompt, video_seed
from longtake.evaluation.video import VideoSource, find_videos

UNITS = "units"
VIDEOS = "videos"
_SAMPLE = re.compile(r"-(\d+)$")
_PROMPT_FILES = ("prompt_file.json", "prompts.json")
"""Where a folder's prompts may stand, if nothing else says them; the first is what VBench calls it."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Videos that are made together, or one that exists."""

    label: str  # of the run
    number: int  # within the run, from 0
    share: int  # the process it falls to is this modulo their number
    folder: Path  # of the run
    lines: tuple[ManifestLine, ...]  # one per video; what only the finished video tells is filled in when it is there
    prompts: tuple[Prompt, ...] = ()  # what to generate from; empty for a video that exists

    @property
    def title(self) -> str:
        return f"{self.label}, videos {self.lines[0].id} to {self.lines[-1].id}"

    @property
    def is_generated(self) -> bool:
        return bool(self.prompts)

    @property
    def num_steps(self) -> int:
        """For progress: one per video made and one per video measured."""
        return len(self.lines) * (2 if self.is_generated else 1)

    @property
    def record_path(self) -> Path:
        return self.folder / UNITS / f"{self.number:05d}.json"

    def score_path(self, line: ManifestLine) -> Path:
        return self.folder / SCORES / score_name(line.id)

    def finished_lines(self) -> tuple[ManifestLine, ...]:
        if not self.is_generated:
            return self.lines
        record = read_json(self.record_path) or {"lines": ()}
        return tuple(ManifestLine.from_json(values) for values in record["lines"])

    def videos_exist(self, lines: Sequence[ManifestLine]) -> bool:
        return bool(lines) and all((self.folder / line.file).exists() for line in lines)

    def is_measured(self, line: ManifestLine) -> bool:
        values = read_json(self.score_path(line))
        # Through JSON, so that tuples and lists are the same.
        return values is not None and values["video"] == json.loads(json.dumps(line.to_json()))

    def is_done(self, *, keep_videos: bool) -> bool:
        lines = self.finished_lines()
        if not lines or not all(self.is_measured(line) for line in lines):
            return False
        return not (self.is_generated and keep_videos) or self.videos_exist(lines)


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """One run: a policy's videos, or a folder of them, and where its manifest, scores and results go.

    ``policy`` holds the settings of the cache policy, and of ``attention`` where it is sparse, if they are known.
    """

    label: str
    folder: Path
    policy: Mapping[str, Any] = field(default_factory=dict)
    units: tuple[Unit, ...] = ()


def interleaved(runs: Sequence[RunPlan]) -> list[Unit]:
    """All units, policy after policy within every batch: stopped early, the policies have seen the same prompts."""
    units = ((position, unit) for position, run in enumerate(runs) for unit in run.units)
    return [unit for _, unit in sorted(units, key=lambda item: (item[1].number, item[0]))]


def plan_generation(protocol: Protocol, prompts: Sequence[Prompt], out: Path) -> list[RunPlan]:
    """Cut every policy's videos into batches, all prompts of one seed first.

    Only videos whose prompts change at the same times can be made together. No video is left out because it does
    not fill a batch.
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


def plan_videos(
    folder: Path,
    out: Path,
    *,
    manifest: Path | None = None,
    prompt_file: Path | None = None,
    fps: float | None = None,
    mixed_rates: bool = False,
) -> list[RunPlan]:
    """Plan the measuring of existing videos, whose scores go to ``out``.

    A folder with videos or a manifest is one run; a folder of such folders is a run for each, to be compared.
    Prompts come from the manifest, else from the file of prompts, else from the file names as VBench reads them.

    Args:
        folder: Of the videos.
        out: Of the evaluation.
        manifest: JSON lines, instead of ``manifest.jsonl`` in the folder; file names relative to it.
        prompt_file: JSON mapping of file names, relative to the folder, to prompts; without it and without a manifest,
            ``prompt_file.json`` or ``prompts.json`` in the folder, if there is one.
        fps: Frames per second of folders of frames, which do not say it.
        mixed_rates: Whether a run may hold videos of different frame rates.

    Raises:
        ValueError: If a video cannot be read or has no frames, a run mixes frame rates, or videos and prompts do not
            match.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder of videos at {folder}: give one with --videos")
    if manifest is not None and prompt_file is not None:
        raise ValueError(f"both a manifest ({manifest}) and a file of prompts ({prompt_file}): give one of the two")
    groups = _groups(folder, manifest)
    if manifest is None and prompt_file is None and not any((path / MANIFEST).is_file() for path in groups.values()):
        prompt_file = next((path for name in _PROMPT_FILES if (path := folder / name).is_file()), None)
    prompts = None if prompt_file is None else _read_prompt_file(prompt_file)
    found = {label: _lines(path, folder, prompts, manifest) for label, path in groups.items()}
    if prompts is not None:
        paths = [Path(line.file) for lines in found.values() for line in lines]
        names = {name for path in paths for name in _names(path, folder)}
        if unused := sorted(prompts.keys() - names):
            raise ValueError(
                f"{prompt_file} has prompts for {len(unused)} videos that are not there, the first is {unused[0]!r}"
            )
    is_single = list(groups.values()) == [folder]
    runs = []
    for label, lines in _with_prompt_indices(found).items():
        place = out if is_single else out / label
        lines = [_measurable(line, place, fps) for line in lines]
        if not mixed_rates:
            _check_rates(label, lines)
        units = (
            Unit(label=label, number=number, share=number, folder=place, lines=(line,))
            for number, line in enumerate(lines)
        )
        runs.append(RunPlan(label=label, folder=place, units=tuple(units)))
    return runs


def prompt_of_name(stem: str) -> tuple[str, int]:
    """Prompt and sample number of a file name without its ending, by VBench's rule: ``PROMPT-NUMBER``."""
    match = _SAMPLE.search(stem)
    return (stem, 0) if match is None else (stem[: match.start()], int(match[1]))


def video_info(line: ManifestLine, source: VideoSource) -> VideoInfo:
    """Facts for metrics: from the manifest line, and from the file itself where both say it."""
    return VideoInfo(
        id=line.id,
        num_frames=source.num_frames,
        fps=source.fps,
        height=source.height,
        width=source.width,
        prompt=line.prompt,
        segments=line.segments,
        chunk_starts=line.chunk_starts,
        path=source.path,
    )


def _names(path: Path, root: Path) -> tuple[str, str, str]:
    return path.relative_to(root).as_posix(), path.name, path.stem


def _groups(folder: Path, manifest: Path | None) -> dict[str, Path]:
    """Folders of the runs by label."""

    def is_run(path: Path) -> bool:
        return (path / MANIFEST).is_file() or any(video.is_file() for video in find_videos(path))

    if manifest is not None or is_run(folder):
        return {_label(folder): folder}
    inner = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    inner = [path for path in inner if is_run(path)]
    runs = {_label(path): path for path in inner}
    if len(runs) < len(inner):
        alike = [path.name for path in inner if runs[_label(path)] != path]
        raise ValueError(f"{folder}: {alike[0]!r} and another folder would have the same label: rename one")
    if runs:
        return runs
    if find_videos(folder):
        # Its folders are videos: frames one by one.
        return {_label(folder): folder}
    raise ValueError(f"{folder} holds no videos: give a folder of .mp4 files, of frame folders, or of such folders")


def _label(folder: Path) -> str:
    name = folder.resolve().name
    return name if LABEL.fullmatch(name) else re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-.") or "videos"


def _lines(folder: Path, root: Path, prompts: Mapping[str, str] | None, manifest: Path | None) -> list[ManifestLine]:
    """Lines of a run's videos; ``file`` is the path as it can be opened from here."""
    if manifest is None and prompts is None and (folder / MANIFEST).is_file():
        manifest = folder / MANIFEST
    if manifest is not None:
        return _from_manifest(manifest, folder)
    lines = []
    for path in find_videos(folder):
        prompt, seed_index = prompt_of_name(path.stem)
        if prompts is not None:
            keys = _names(path, root)
            key = next((key for key in keys if key in prompts), None)
            if key is None:
                raise ValueError(f"the file of prompts has none for {keys[0]}: give one for every video")
            prompt = prompts[key]
        lines.append(ManifestLine(id=path.stem, file=str(path), prompt=prompt, seed_index=seed_index))
    if twice := [name for name, count in Counter(line.id for line in lines).items() if count > 1]:
        raise ValueError(f"{folder} has two videos named {twice[0]!r}: rename one, scores go by the name")
    return lines


def _from_manifest(manifest: Path, folder: Path) -> list[ManifestLine]:
    lines = read_manifest(manifest)
    if not lines:
        raise ValueError(f"{manifest} names no videos: give a line for each")
    by_stem = {path.stem: path for path in find_videos(manifest.parent)}
    paths: list[Path] = []
    for line in lines:
        if "/" in line.id or line.id.startswith("."):
            raise ValueError(f"{manifest}: id {line.id!r} must be a plain file name")
        path = manifest.parent / line.file if line.file else by_stem.get(line.id)
        if path is None:
            raise ValueError(f"{manifest}: {line.id!r} has no 'file', and {manifest.parent} no video of that name")
        paths.append(path)
    if missing := [path for path in paths if not path.exists()]:
        raise ValueError(f"{manifest} names {len(missing)} videos that are not there, the first is {missing[0]}")
    named = {path.resolve() for path in paths}
    strange = [path for path in find_videos(folder) if path.is_file() and path.resolve() not in named]
    if strange:
        raise ValueError(
            f"{manifest} has no line for {len(strange)} videos of {folder}, the first is {strange[0].name}"
        )
    return [replace(line, file=str(path)) for line, path in zip(lines, paths, strict=True)]


def _read_prompt_file(path: Path) -> dict[str, str]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the file of prompts {path}: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(text, str) for text in values.values()):
        raise ValueError(f"{path} must be a JSON mapping of file names to prompts")
    return values


def _with_prompt_indices(found: Mapping[str, list[ManifestLine]]) -> dict[str, list[ManifestLine]]:
    """Number prompts the same in all runs, and samples within a prompt, where no manifest does."""
    texts = dict.fromkeys(line.prompt for lines in found.values() for line in lines)
    numbers = {text: index for index, text in enumerate(texts)}
    result = dict(found)
    for label, lines in found.items():
        pairs = {(line.prompt_index, line.seed_index) for line in lines}
        if len(pairs) == len(lines) and any(line.prompt_index for line in lines):
            continue
        seen: set[tuple[int, int]] = set()
        result[label] = []
        for line in lines:
            prompt, seed = numbers[line.prompt], line.seed_index
            while (prompt, seed) in seen:
                seed += 1
            seen.add((prompt, seed))
            result[label].append(replace(line, prompt_index=prompt, seed_index=seed))
    return result


def _measurable(line: ManifestLine, folder: Path, fps: float | None) -> ManifestLine:
    """A line with what the file itself says, which goes over what the manifest says."""
    path = Path(line.file)
    source = VideoSource.open(path, fps=fps if path.is_dir() else None)
    return replace(
        line,
        # Relative where that is possible, so that a folder of results can be moved with its videos.
        file=Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix(),
        num_frames=source.num_frames,
        fps=source.fps,
        height=source.height,
        width=source.width,
        encoder=line.encoder or source.encoder,
        sha256=source.sha256(),
    )


def _check_rates(label: str, lines: Sequence[ManifestLine]) -> None:
    odd = next((line for line in lines if line.fps != lines[0].fps), None)
    if odd is not None:
        raise ValueError(
            f"run {label!r} mixes frame rates: {lines[0].id} has {lines[0].fps:g} frames per second, {odd.id} "
            f"{odd.fps:g}: split the folder, or measure them as they are with --mixed-rates"
        )
