"""The file that a run goes on from: opened as its configuration says, recorded, and held to its hash."""

import hashlib
from pathlib import Path
from typing import Any

from longtake.configs.families import ModelFamily
from longtake.configs.run import RunConfig, StartConfig
from longtake.pipelines.clips import Clip, Cut, make_clip, make_stills
from longtake.pipelines.given import TakenLatents
from longtake.pipelines.run_folder import RunFolder
from longtake.pipelines.video_start import plan_start


def open_start(start: StartConfig) -> Clip:
    """Open the image or the video.

    Raises:
        ValueError: If it cannot be read.
    """
    if start.kind == "image":
        return make_stills(Path(start.path))[0]
    return make_clip(Path(start.path), seconds=start.seconds)


def check_start(config: RunConfig, family: ModelFamily) -> None:
    """Refuse a start that cannot be read or that the model cannot go on from; no weights are needed.

    Args:
        config: Of a run with a start.
        family: Of its model.

    Raises:
        ValueError: With the value, the limit and the remedy.
    """
    _planned(config, family)


def start_arguments(config: RunConfig, source: RunFolder | None = None) -> dict[str, Any]:
    """What ``LongVideoPipeline.start`` is told of a run's start; nothing where there is none.

    Args:
        config: The run.
        source: Its folder, or that of the run it is forked from. With a saved state in it the file is not needed any
            more; without one it has to be the one that the run began with.

    Raises:
        ValueError: If the file is needed and cannot be read, or is another one now.
    """
    start = config.start
    if start is None:
        return {}
    arguments: dict[str, Any] = {"include_start": start.include}
    record = None if source is None else source.record["start"]
    if source is not None and source.states.blocks():
        return arguments | {"video_latents": TakenLatents(record["num_latent_frames"])}
    clip = open_start(start)
    if record is not None and _sha256(clip.path) != record["sha256"]:
        raise ValueError(f"{clip.path} is not the file any more that {source.path} began with: restore it")
    return arguments | {start.kind: clip}


def start_record(config: RunConfig, family: ModelFamily) -> dict[str, Any] | None:
    """What ``run.json`` says of a run's start; None where there is none.

    Args:
        config: The run.
        family: Of its model.
    """
    if config.start is None:
        return None
    clip, cut = _planned(config, family)
    return {
        "kind": config.start.kind,
        "file": str(clip.path),
        "sha256": _sha256(clip.path),
        "size": [clip.height, clip.width],
        "num_file_frames": clip.num_frames,
        "file_fps": clip.fps,
        "first_file_frame": cut.indices[0],
        "num_latent_frames": cut.num_latent_frames,
        "num_frames": len(cut.indices),
        "seconds": len(cut.indices) / family.fps,
        "num_left_out": cut.num_left_out,
        "is_included": config.start.include,
    }


def _planned(config: RunConfig, family: ModelFamily) -> tuple[Clip, Cut]:
    clip = open_start(config.start)
    height, width = config.height or family.height, config.width or family.width
    return clip, plan_start(clip, config.start.kind, family=family, height=height, width=width)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
