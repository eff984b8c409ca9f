"""Folders of existing videos: which runs they hold, and which prompt each video was made from."""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from longtake.evaluation.records import ManifestLine, read_manifest
from longtake.evaluation.running.plan import MANIFEST, RunPlan, Unit
from longtake.evaluation.running.protocol import LABEL
from longtake.evaluation.video import VideoSource, find_videos

SAMPLE = re.compile(r"-(\d+)$")

PROMPT_FILES = ("prompt_file.json", "prompts.json")
"""Where a folder's prompts may stand, if nothing else says them; the first is what VBench calls it."""


@dataclass(frozen=True)
class _Found:
    """A video and where it is.

    Attributes:
        path: The file or folder of frames.
        line: What is known of it.
    """

    path: Path
    line: ManifestLine


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
        _check_all_used(prompts, found, prompt_file, folder)
    found = _with_prompt_indices(found)
    single = len(groups) == 1 and next(iter(groups.values())) == folder
    runs = [
        _run(label, videos, groups[label], out if single else out / label, fps=fps) for label, videos in found.items()
    ]
    if not (has_backbones if mixed_rates is None else mixed_rates):
        for run in runs:
            _check_rates(run)
    return runs


def prompt_of_name(stem: str) -> tuple[str, int]:
    """Prompt and sample number by VBench's rule: the name without a trailing ``-NUMBER``.

    Args:
        stem: File name without its ending.
    """
    match = SAMPLE.search(stem)
    if match is None:
        return stem, 0
    return stem[: match.start()], int(match[1])


def _groups(folder: Path, manifest: Path | None) -> dict[str, Path]:
    """{label: folder} of the runs."""
    if manifest is not None or (folder / MANIFEST).is_file() or _has_files(folder):
        return {_label(folder): folder}
    inner = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    inner = [path for path in inner if (path / MANIFEST).is_file() or _has_files(path)]
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


def _has_files(folder: Path) -> bool:
    return any(path.is_file() for path in find_videos(folder))


def _label(folder: Path) -> str:
    name = folder.resolve().name
    return name if LABEL.fullmatch(name) else re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-.") or "videos"


def _lines(folder: Path, root: Path, prompts: Mapping[str, str] | None, manifest: Path | None) -> list[_Found]:
    if manifest is None and prompts is None and (folder / MANIFEST).is_file():
        manifest = folder / MANIFEST
    if manifest is not None:
        return _from_manifest(manifest, folder)
    found = []
    for path in find_videos(folder):
        if prompts is None:
            prompt, _ = prompt_of_name(path.stem)
        else:
            keys = (path.relative_to(root).as_posix(), path.name, path.stem)
            prompt = next((prompts[key] for key in keys if key in prompts), None)
            if prompt is None:
                raise ValueError(f"the file of prompts has none for {keys[0]}: give one for every video")
        line = ManifestLine(id=path.stem, file=path.name, prompt=prompt, seed_index=prompt_of_name(path.stem)[1])
        found.append(_Found(path, line))
    twice = [name for name, count in Counter(item.line.id for item in found).items() if count > 1]
    if twice:
        raise ValueError(f"{folder} has two videos named {twice[0]!r}: rename one, scores go by the name")
    return found


def _from_manifest(manifest: Path, folder: Path) -> list[_Found]:
    lines = read_manifest(manifest)
    if not lines:
        raise ValueError(f"{manifest} names no videos: give a line for each")
    by_stem = {path.stem: path for path in find_videos(manifest.parent)}
    paths = [manifest.parent / line.file if line.file else by_stem.get(line.id) for line in lines]
    if None in paths:
        strange = lines[paths.index(None)].id
        raise ValueError(f"{manifest}: {strange!r} has no 'file', and {manifest.parent} no video of that name")
    found = [_Found(path, line) for path, line in zip(paths, lines, strict=True)]
    missing = [str(item.path) for item in found if not item.path.exists()]
    if missing:
        raise ValueError(f"{manifest} names {len(missing)} videos that are not there, the first is {missing[0]}")
    named = {item.path.resolve() for item in found}
    strange = [path for path in find_videos(folder) if path.is_file() and path.resolve() not in named]
    if strange:
        raise ValueError(
            f"{manifest} has no line for {len(strange)} videos of {folder}, the first is {strange[0].name}"
        )
    for line in lines:
        if "/" in line.id or line.id.startswith("."):
            raise ValueError(f"{manifest}: id {line.id!r} must be a plain file name")
    return found


def _read_prompt_file(path: Path) -> dict[str, str]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the file of prompts {path}: {error}") from error
    if not isinstance(values, Mapping) or not all(isinstance(text, str) for text in values.values()):
        raise ValueError(f"{path} must be a JSON mapping of file names to prompts")
    return dict(values)


def _check_all_used(
    prompts: Mapping[str, str], found: Mapping[str, Sequence[_Found]], path: Path | None, root: Path
) -> None:
    items = [item for videos in found.values() for item in videos]
    paths = [item.path for item in items]
    names = {name for path in paths for name in (path.name, path.stem, path.relative_to(root).as_posix())}
    unused = sorted(prompts.keys() - names)
    if unused:
        raise ValueError(f"{path} has prompts for {len(unused)} videos that are not there, the first is {unused[0]!r}")


def _with_prompt_indices(found: Mapping[str, Sequence[_Found]]) -> dict[str, list[_Found]]:
    """Number prompts the same in all runs, and samples within a prompt, where no manifest does."""
    texts = [item.line.prompt for videos in found.values() for item in videos]
    numbers = {text: index for index, text in enumerate(dict.fromkeys(texts))}
    result = {}
    for label, videos in found.items():
        pairs = [(item.line.prompt_index, item.line.seed_index) for item in videos]
        if len(set(pairs)) == len(pairs) and any(item.line.prompt_index for item in videos):
            result[label] = list(videos)
            continue
        seen: set[tuple[int, int]] = set()
        renumbered = []
        for item in videos:
            prompt, seed = numbers[item.line.prompt], item.line.seed_index
            while (prompt, seed) in seen:
                seed += 1
            seen.add((prompt, seed))
            renumbered.append(_Found(item.path, replace(item.line, prompt_index=prompt, seed_index=seed)))
        result[label] = renumbered
    return result


def _run(label: str, videos: Sequence[_Found], source: Path, folder: Path, *, fps: float | None) -> RunPlan:
    lines = [_measurable(item, folder, fps) for item in videos]
    units = tuple(
        Unit(label=label, number=number, share=number, folder=folder, lines=(line,))
        for number, line in enumerate(lines)
    )
    return RunPlan(label=label, folder=folder, units=units)


def _check_rates(run: RunPlan) -> None:
    lines = [line for unit in run.units for line in unit.lines]
    odd = next((line for line in lines if line.fps != lines[0].fps), None)
    if odd is not None:
        raise ValueError(
            f"run {run.label!r} mixes frame rates: {lines[0].id} has {lines[0].fps:g} frames per second, {odd.id} "
            f"{odd.fps:g}: split the folder, or measure them as they are with --mixed-rates"
        )


def _measurable(item: _Found, folder: Path, fps: float | None) -> ManifestLine:
    """What the file itself says goes over what the manifest says."""
    source = VideoSource.open(item.path, fps=fps if item.path.is_dir() else None)
    return replace(
        item.line,
        # Relative where that is possible, so that a folder of results can be moved with its videos.
        file=Path(os.path.relpath(item.path.resolve(), folder.resolve())).as_posix(),
        num_frames=source.num_frames,
        fps=source.fps,
        height=source.height,
        width=source.width,
        encoder=item.line.encoder or source.encoder,
        sha256=source.sha256(),
    )
