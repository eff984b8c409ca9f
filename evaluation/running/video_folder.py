"""Runs of existing videos in a folder, and the prompt each video was made from."""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from longtake.evaluation.records import ManifestLine, read_manifest
from longtake.evaluation.running.plan import MANIFEST, RunPlan, Unit
from longtake.evaluation.running.protocol import LABEL
from longtake.evaluation.video import VideoSource, find_videos

SAMPLE = re.compile(r"-(\d+)$")
PROMPT_FILES = ("prompt_file.json", "prompts.json")
"""Where a folder's prompts may stand, if nothing else says them; the first is what VBench calls it."""


def plan_videos(
    folder: Path,
    out: Path,
    *,
    manifest: Path | None = None,
    prompt_file: Path | None = None,
    fps: float | None = None,
    mixed_rates: bool | None = None,
    has_backbones: bool = False,
) -> list[RunPlan]:
    """Plan the measuring of existing videos.

    A folder with videos or a manifest is one run; a folder of such folders is a run for each, to be compared.
    Prompts come from the manifest, else from the file of prompts, else from the file names as VBench reads them.

    Args:
        folder: Of the videos.
        out: Folder of the evaluation.
        manifest: JSON lines, instead of ``manifest.jsonl`` in the folder; file names relative to it.
        prompt_file: JSON mapping of file names, relative to the folder, to prompts; without it and without a manifest,
            ``prompt_file.json`` or ``prompts.json`` in the folder, if there is one.
        fps: Frames per second of folders of frames, which do not say it.
        mixed_rates: Whether a run may hold videos of different frame rates. None: with given networks, because VBench
            measures every clip at its own rate.
        has_backbones: Whether the networks are given.

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
        prompt_file = next((path for name in PROMPT_FILES if (path := folder / name).is_file()), None)
    prompts = None if prompt_file is None else _read_prompt_file(prompt_file)
    found = {label: _lines(path, folder, prompts, manifest) for label, path in groups.items()}
    if prompts is not None:
        paths = [Path(line.file) for lines in found.values() for line in lines]
        names = {name for path in paths for name in (path.name, path.stem, path.relative_to(folder).as_posix())}
        if unused := sorted(prompts.keys() - names):
            raise ValueError(
                f"{prompt_file} has prompts for {len(unused)} videos that are not there, the first is {unused[0]!r}"
            )
    found = _with_prompt_indices(found)
    is_single = list(groups.values()) == [folder]
    runs = [_run(label, lines, out if is_single else out / label, fps=fps) for label, lines in found.items()]
    if not (has_backbones if mixed_rates is None else mixed_rates):
        for run in runs:
            _check_rates(run)
    return runs


def prompt_of_name(stem: str) -> tuple[str, int]:
    """Prompt and sample number of a file name without its ending, by VBench's rule: ``PROMPT-NUMBER``."""
    match = SAMPLE.search(stem)
    return (stem, 0) if match is None else (stem[: match.start()], int(match[1]))


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
            keys = (path.relative_to(root).as_posix(), path.name, path.stem)
            key = next((key for key in keys if key in prompts), None)
            if key is None:
                raise ValueError(f"the file of prompts has none for {keys[0]}: give one for every video")
            prompt = prompts[key]
        lines.append(ManifestLine(id=path.stem, file=str(path), prompt=prompt, seed_index=seed_index))
    twice = [name for name, count in Counter(line.id for line in lines).items() if count > 1]
    if twice:
        raise ValueError(f"{folder} has two videos named {twice[0]!r}: rename one, scores go by the name")
    return lines


def _from_manifest(manifest: Path, folder: Path) -> list[ManifestLine]:
    lines = read_manifest(manifest)
    if not lines:
        raise ValueError(f"{manifest} names no videos: give a line for each")
    by_stem = {path.stem: path for path in find_videos(manifest.parent)}
    paths: list[Path] = []
    for line in lines:
        path = manifest.parent / line.file if line.file else by_stem.get(line.id)
        if path is None:
            raise ValueError(f"{manifest}: {line.id!r} has no 'file', and {manifest.parent} no video of that name")
        paths.append(path)
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise ValueError(f"{manifest} names {len(missing)} videos that are not there, the first is {missing[0]}")
    named = {path.resolve() for path in paths}
    strange = [path for path in find_videos(folder) if path.is_file() and path.resolve() not in named]
    if strange:
        raise ValueError(
            f"{manifest} has no line for {len(strange)} videos of {folder}, the first is {strange[0].name}"
        )
    for line in lines:
        if "/" in line.id or line.id.startswith("."):
            raise ValueError(f"{manifest}: id {line.id!r} must be a plain file name")
    return [replace(line, file=str(path)) for line, path in zip(lines, paths, strict=True)]


def _read_prompt_file(path: Path) -> dict[str, str]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the file of prompts {path}: {error}") from error
    if not isinstance(values, Mapping) or not all(isinstance(text, str) for text in values.values()):
        raise ValueError(f"{path} must be a JSON mapping of file names to prompts")
    return dict(values)


def _with_prompt_indices(found: Mapping[str, Sequence[ManifestLine]]) -> dict[str, Sequence[ManifestLine]]:
    """Number prompts the same in all runs, and samples within a prompt, where no manifest does."""
    texts = dict.fromkeys(line.prompt for lines in found.values() for line in lines)
    numbers = {text: index for index, text in enumerate(texts)}
    result: dict[str, Sequence[ManifestLine]] = {}
    for label, lines in found.items():
        pairs = {(line.prompt_index, line.seed_index) for line in lines}
        if len(pairs) == len(lines) and any(line.prompt_index for line in lines):
            result[label] = lines
            continue
        seen: set[tuple[int, int]] = set()
        renumbered = []
        for line in lines:
            prompt, seed = numbers[line.prompt], line.seed_index
            while (prompt, seed) in seen:
                seed += 1
            seen.add((prompt, seed))
            renumbered.append(replace(line, prompt_index=prompt, seed_index=seed))
        result[label] = renumbered
    return result


def _run(label: str, lines: Sequence[ManifestLine], folder: Path, *, fps: float | None) -> RunPlan:
    units = tuple(
        Unit(label=label, number=number, share=number, folder=folder, lines=(_measurable(line, folder, fps),))
        for number, line in enumerate(lines)
    )
    return RunPlan(label=label, folder=folder, units=units)


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


def _check_rates(run: RunPlan) -> None:
    lines = [line for unit in run.units for line in unit.lines]
    odd = next((line for line in lines if line.fps != lines[0].fps), None)
    if odd is not None:
        raise ValueError(
            f"run {run.label!r} mixes frame rates: {lines[0].id} has {lines[0].fps:g} frames per second, {odd.id} "
            f"{odd.fps:g}: split the folder, or measure them as they are with --mixed-rates"
        )
