"""Filmstrips: a few frames of the same prompts under every policy, one small image per video."""

from base64 import b64encode
from collections import Counter
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps

from longtake.evaluation.records import NUM_SHOWN_PROMPTS, ManifestLine
from longtake.evaluation.report.data import ReportData
from longtake.evaluation.video import VideoSource

_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
_FRAME = (144, 128)
"""Width and height that a frame fits into, in pixels."""
_QUALITY = 62
_GAP = 3
"""Transparent pixels between two frames of a strip."""


@dataclass(frozen=True, kw_only=True)
class Film:
    """A policy's strip of a prompt, or the reason why there is none."""

    label: str
    uri: str = ""
    alt: str = ""
    width: int = 240
    height: int = 0
    reason: str = ""


def films_by_prompt(data: ReportData) -> list[tuple[int, str, list[Film]]]:
    """(prompt index, its text, a film per policy) of the prompts shown; empty without folders of videos."""
    found = []
    for prompt in shared_prompts(data) if data.videos else ():
        lines = {label: line for label in data.videos if (line := _first_video(data, label, prompt)) is not None}
        films = [_film(data.videos[label], lines[label], label) for label in data.labels if label in lines]
        found.append((prompt, next((line.prompt for line in lines.values()), ""), films))
    return found


def shared_prompts(data: ReportData, *, count: int = NUM_SHOWN_PROMPTS) -> list[int]:
    """Return the first prompts that most policies have a video of."""
    counts = Counter(prompt for _, prompt in {(label, line.prompt_index) for label, line in data.lines})
    most = max(counts.values(), default=0)
    return sorted(prompt for prompt, number in counts.items() if number == most)[:count]


def _first_video(data: ReportData, label: str, prompt: int) -> ManifestLine | None:
    lines = [line for own, line in data.lines if own == label and line.prompt_index == prompt]
    return min(lines, key=lambda line: line.seed_index, default=None)


def _film(folder: Path, line: ManifestLine, label: str) -> Film:
    path = find_video(folder, line)
    if path is None:
        return Film(label=label, reason=f"{PurePosixPath(line.file).name} is not there any more")
    try:
        image = _strip(VideoSource.open(path, fps=line.fps or None))
    except ValueError as error:
        return Film(label=label, reason=f"not shown: {error}")
    buffer = BytesIO()
    image.save(buffer, format="WEBP", quality=_QUALITY, method=4)
    uri = "data:image/webp;base64," + b64encode(buffer.getvalue()).decode("ascii")
    shares = ", ".join(f"{share:.0%}" for share in _SHARES)
    alt = f"{label}, seed {line.seed_index}: frames at {shares} of the video"
    return Film(label=label, uri=uri, alt=alt, width=image.width, height=image.height)


def find_video(folder: Path, line: ManifestLine) -> Path | None:
    """Return a manifest line's video below the folder, or in it under its own name; None if there is none."""
    candidates = (folder / line.file, folder / PurePosixPath(line.file).name)
    return next((path for path in candidates if path.exists()), None)


def strip_indices(num_frames: int) -> list[int]:
    """Return indices of the first frame, of one at each quarter and of the last."""
    return [round(share * (num_frames - 1)) for share in _SHARES]


def _strip(source: VideoSource) -> Image.Image:
    """Frames of a video side by side, decoded as a stream that stops after the last one needed."""
    wanted = strip_indices(source.num_frames)
    found: dict[int, np.ndarray] = {}
    start = 0
    for piece in source.pieces():
        found |= {index: piece[index - start] for index in wanted if start <= index < start + len(piece)}
        start += len(piece)
        if len(found) == len(set(wanted)):
            break
    frames = [_resized(found[index]) for index in wanted]
    width = frames[0].width
    strip = Image.new("RGBA", ((width + _GAP) * len(frames) - _GAP, frames[0].height), (0, 0, 0, 0))
    for position, frame in enumerate(frames):
        strip.paste(frame, (position * (width + _GAP), 0))
    return strip


def _resized(frame: np.ndarray) -> Image.Image:
    """A frame in its box; small ones are enlarged by a whole factor with sharp edges."""
    image = Image.fromarray(np.ascontiguousarray(frame))
    factor = int(min(_FRAME[0] / image.width, _FRAME[1] / image.height))
    if factor:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return ImageOps.contain(image, _FRAME, Image.Resampling.LANCZOS)
