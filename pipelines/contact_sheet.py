"""A picture of a video: frames at even times with their time below."""

from collections.abc import Iterator
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from longtake.pipelines.fragments import count_frames
from longtake.pipelines.run_files import with_temporary

TILE_WIDTH = 192
LABEL_HEIGHT = 24
MARGIN = 6


def even_frames(num_frames: int, *, num_tiles: int) -> list[int]:
    """Choose frames at even times, the first and the last included.

    Args:
        num_frames: Frames of the video.
        num_tiles: How many to choose, at most.
    """
    count = min(num_frames, num_tiles)
    return [round(index) for index in np.linspace(0, num_frames - 1, count)]


def read_frames(video: Path, indices: list[int]) -> Iterator[np.ndarray]:
    """Decode some frames of a video, one after the other.

    Args:
        video: Any file that ffmpeg reads.
        indices: Frame numbers, rising.

    Yields:
        (height, width, 3) uint8.
    """
    wanted = "+".join(rf"eq(n\,{index})" for index in indices)
    reader = imageio_ffmpeg.read_frames(
        str(video), output_params=["-vf", f"select={wanted}", "-fps_mode", "passthrough"]
    )
    width, height = next(reader)["source_size"]
    for data in reader:
        yield np.frombuffer(data, np.uint8).reshape(height, width, 3)


def write_contact_sheet(video: Path, path: Path, *, fps: float, num_tiles: int = 12, num_columns: int = 6) -> None:
    """Write a PNG with frames at even times.

    Args:
        video: A finished ``video.mp4``.
        path: The PNG; replaced if it is there.
        fps: Frames per second, for the labels.
        num_tiles: Frames to show, at most.
        num_columns: Frames per row.

    Raises:
        ValueError: If the video has no frames.
        OSError: If the picture cannot be written.
    """
    indices = even_frames(count_frames(video), num_tiles=num_tiles)
    if not indices:
        raise ValueError(f"{video} has no frames to show")
    tiles = [
        _tile(frame, f"{index / fps:.1f} s") for frame, index in zip(read_frames(video, indices), indices, strict=True)
    ]
    width, height = tiles[0].size
    columns = min(num_columns, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, rows * (height + MARGIN) + MARGIN), "white")
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        sheet.paste(tile, (MARGIN + column * (width + MARGIN), MARGIN + row * (height + MARGIN)))
    with_temporary(path, lambda temporary: sheet.save(temporary, format="PNG"))


def _tile(frame: np.ndarray, label: str) -> Image.Image:
    image = Image.fromarray(frame)
    # Whole-number nearest enlargement keeps the pixels of a small video sharp; large ones shrink smoothly.
    factor = TILE_WIDTH // image.width
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    elif image.width > TILE_WIDTH:
        image = image.resize((TILE_WIDTH, round(image.height * TILE_WIDTH / image.width)), Image.Resampling.LANCZOS)
    tile = Image.new("RGB", (image.width, image.height + LABEL_HEIGHT), "white")
    tile.paste(image, (0, 0))
    font = ImageFont.load_default(size=16)
    ImageDraw.Draw(tile).text((image.width // 2, image.height + 3), label, fill="black", font=font, anchor="mt")
    return tile
