"""Filmstrips: a few frames of the same prompts under every policy, as one small image per video."""

from base64 import b64encode
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from longtake.evaluation.records import NUM_SHOWN_PROMPTS, ManifestLine
from longtake.evaluation.report.data import ReportData
from longtake.evaluation.report.markup import Markup, tag
from longtake.evaluation.report.pieces import swatch
from longtake.evaluation.video import VideoSource

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
FRAME = (144, 128)
"""Width and height that a frame fits into, in pixels."""
QUALITY = 62
GAP = 3
"""Pixels between two frames of a strip, in the page's background: the image is transparent there."""
WORDS_WIDTH = 240
"""Pixels for the sentence that stands where a video is not there any more."""


def strip_indices(num_frames: int, shares: Sequence[float] = SHARES) -> list[int]:
    """Indices of the frames at shares of a video's length, the first frame at 0 and the last at 1."""
    return [round(share * (num_frames - 1)) for share in shares]


def film_strip(source: VideoSource, *, box: tuple[int, int] = FRAME, shares: Sequence[float] = SHARES) -> Image.Image:
    """Frames of a video side by side, decoded as it streams by.

    Args:
        source: The video.
        box: Width and height that a frame fits into; small videos are enlarged by a whole factor with sharp edges.
        shares: Which frames, as shares of the length.
    """
    wanted = strip_indices(source.num_frames, shares)
    found: dict[int, np.ndarray] = {}
    start = 0
    for piece in source.pieces():
        found |= {index: piece[index - start] for index in wanted if start <= index < start + len(piece)}
        start += len(piece)
        if len(found) == len(set(wanted)):
            break
    frames = [_resized(found[index], box) for index in wanted]
    width = sum(frame.width for frame in frames) + GAP * (len(frames) - 1)
    strip = Image.new("RGBA", (width, frames[0].height), (0, 0, 0, 0))
    left = 0
    for frame in frames:
        strip.paste(frame, (left, 0))
        left += frame.width + GAP
    return strip


def _resized(frame: np.ndarray, box: tuple[int, int]) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(frame))
    factor = min(box[0] / image.width, box[1] / image.height)
    if factor >= 1:
        size = (image.width * int(factor), image.height * int(factor))
        return image.resize(size, Image.Resampling.NEAREST)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.LANCZOS)


def data_uri(image: Image.Image) -> str:
    """An image as a WebP data URI."""
    buffer = BytesIO()
    image.save(buffer, format="WEBP", quality=QUALITY, method=4)
    return "data:image/webp;base64," + b64encode(buffer.getvalue()).decode("ascii")


def shared_prompts(data: ReportData, *, count: int = NUM_SHOWN_PROMPTS) -> list[int]:
    """The first prompts that most policies have a video of: in the order of the list, not chosen by what they show."""
    counts: dict[int, int] = {}
    for label in data.labels:
        run = data.run(label)
        for prompt in {video.video.prompt_index for video in run.videos} if run is not None else ():
            counts[prompt] = counts.get(prompt, 0) + 1
    most = max(counts.values(), default=0)
    return sorted(prompt for prompt, number in counts.items() if number == most)[:count]


def film_section(data: ReportData) -> list[Markup]:
    """A figure per prompt with a strip per policy; empty where no folder of videos is known."""
    figures = []
    for prompt in shared_prompts(data) if data.videos else ():
        rows, text, width = [], "", WORDS_WIDTH
        for label in data.labels:
            line = _first_video(data, label, prompt)
            if line is None or label not in data.videos:
                continue
            text = text or line.prompt
            head = tag("div", swatch(data.style(label)), tag("span", label, class_="label"), class_="who")
            strip, own_width = _strip(data.videos[label], line, label)
            width = max(width, own_width)
            rows.append(tag("div", head, tag("div", strip, class_="strip"), class_="film", data_run=data.index(label)))
        caption = tag("figcaption", tag("strong", f"Prompt {prompt}"), " ", tag("q", text) if text else None)
        grid = tag("div", rows, class_="strips", style=f"--strip:{width}px")
        figures.append(tag("figure", caption, grid, class_="films"))
    return figures


def _first_video(data: ReportData, label: str, prompt: int) -> ManifestLine | None:
    run = data.run(label)
    lines = [video.video for video in run.videos if video.video.prompt_index == prompt] if run is not None else []
    return min(lines, key=lambda line: line.seed_index, default=None)


def _strip(folder: Path, line: ManifestLine, label: str) -> tuple[Markup, int]:
    """The strip, or why there is none; and its width in pixels."""
    path = find_video(folder, line)
    if path is None:
        return tag("span", f"{PurePosixPath(line.file).name} is not there any more", class_="quiet"), 0
    try:
        image = film_strip(VideoSource.open(path, fps=line.fps or None))
    except ValueError as error:
        return tag("span", f"not shown: {error}", class_="quiet"), 0
    words = ", ".join(f"{share:.0%}" for share in SHARES)
    alt = f"{label}, seed {line.seed_index}: frames at {words} of the video"
    size = {"width": image.width, "height": image.height}
    return tag("img", src=data_uri(image), alt=alt, decoding="async", **size), image.width


def find_video(folder: Path, line: ManifestLine) -> Path | None:
    """The video of a manifest line: below the folder, or in it under its own name; None where there is none."""
    candidates = (folder / line.file, folder / PurePosixPath(line.file).name)
    return next((path for path in candidates if path.exists()), None)
