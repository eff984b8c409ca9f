"""What measuring videos costs: frames per second and peak memory by group of metrics, on files made on the fly."""

import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from longtake.evaluation.running.workers import THREAD_VARIABLES
from longtake.pipelines.video_file import VideoFormat, VideoWriter
from longtake.scripts.console import out

FPS = 16.0
PIECE = 16
LIGHT, ALL = ("weight_free",), ("vbench", "long", "weight_free")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A video, and what is measured on it.

    Attributes:
        height: Pixels.
        width: Pixels.
        seconds: Of video.
        groups: Of metrics; their networks are the classical stand-ins.
        workers: Processes of one thread each that measure the same video at once, as an evaluation does.
    """

    height: int
    width: int
    seconds: float
    groups: tuple[str, ...]
    workers: int

    @property
    def num_frames(self) -> int:
        """Of the video."""
        return round(self.seconds * FPS)


CASES = (
    Case(height=256, width=256, seconds=30, groups=LIGHT, workers=1),
    Case(height=256, width=256, seconds=30, groups=LIGHT, workers=2),
    Case(height=256, width=256, seconds=30, groups=ALL, workers=2),
    Case(height=480, width=832, seconds=10, groups=LIGHT, workers=1),
    Case(height=480, width=832, seconds=120, groups=LIGHT, workers=1),
)
"""The last two differ in length only: memory must not."""


def moving_texture(height: int, width: int, num_frames: int) -> Iterator[np.ndarray]:
    """Pieces (F, H, W, 3) uint8 of a disc that bounces in front of a texture that slowly passes by."""
    rng = np.random.default_rng(0)
    wide = rng.integers(40, 200, (height // 8 + 1, width // 4 + 1, 3)).repeat(8, 0).repeat(8, 1)[:height]
    wide = (wide + rng.normal(0, 6, wide.shape)).clip(0, 255).astype(np.uint8)
    rows, columns = np.mgrid[:height, :width]
    radius = height / 8
    for start in range(0, num_frames, PIECE):
        piece = np.empty((min(PIECE, num_frames - start), height, width, 3), dtype=np.uint8)
        for index, frame in enumerate(piece, start=start):
            offset = round(width / 2 * (1 - np.cos(index / FPS / 5)))
            frame[:] = wide[:, offset : offset + width]
            y, x = (abs((speed * index / FPS + 1) % 2 - 1) for speed in (0.31, 0.23))
            frame[(rows - y * height) ** 2 + (columns - x * width) ** 2 < radius**2] = (230, 60, 40)
        yield piece


def measure_case(case: Case, folder: Path) -> dict[str, Any]:
    """Write a video and measure it in processes of their own.

    Args:
        case: What.
        folder: For the file.

    Returns:
        ``seconds`` of wall clock and ``processor_seconds`` of a worker (the decoder's are not in it);
        ``frames_per_second`` and ``times_real_time`` of all workers together; ``peak_mb`` of a worker's memory, torch
        included; and ``num_metrics``.
    """
    path = folder / f"{case.width}x{case.height}-{case.num_frames}.mp4"
    if not path.exists():
        form = VideoFormat(height=case.height, width=case.width, fps=FPS, crf=12)
        with VideoWriter(path, video_format=form) as writer:
            for piece in moving_texture(case.height, case.width, case.num_frames):
                writer.write(piece)
    # Fresh processes: the peak is this case's own, and libraries have not made up their minds about threads.
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    try:
        with multiprocessing.get_context("spawn").Pool(case.workers) as pool:
            workers = pool.starmap(_measure_file, [(str(path), case.groups)] * case.workers, chunksize=1)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    worst = {name: max(worker[name] for worker in workers) for name in workers[0]}
    rate = case.workers * case.num_frames / worst["seconds"]
    return {**asdict(case), **worst, "frames_per_second": rate, "times_real_time": rate / FPS}


def _measure_file(path: str, groups: tuple[str, ...]) -> dict[str, float]:
    import torch

    from longtake.evaluation.backbones import classical_backbones
    from longtake.evaluation.metric import VideoInfo
    from longtake.evaluation.metrics import make_metrics
    from longtake.evaluation.video import VideoSource, measure

    torch.set_num_threads(1)
    metrics, _ = make_metrics(classical_backbones(), groups=groups)
    source = VideoSource.open(path)
    info = VideoInfo(
        id="video", num_frames=source.num_frames, fps=source.fps, height=source.height, width=source.width
    )
    wall, processor = time.perf_counter(), time.process_time()
    scores = measure(source, info, metrics)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "seconds": time.perf_counter() - wall,
        "processor_seconds": time.process_time() - processor,
        "peak_mb": peak / 1e6,
        "num_metrics": len(scores),
    }


def measure_evaluation(cases: Sequence[Case] = CASES) -> list[dict[str, Any]]:
    """Frames per second, times real time and peak memory of measuring videos, decoding included.

    Args:
        cases: To measure, one after another.

    Returns:
        One record per case.
    """
    table = Table("groups", "video", "workers", "frames/s", "x real time", "processor ms/frame", "peak MB")
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            record = measure_case(case, Path(folder))
            records.append(record)
            table.add_row(
                f"{', '.join(case.groups)} ({record['num_metrics']:.0f})",
                f"{case.width}x{case.height}, {case.seconds:g} s",
                str(case.workers),
                f"{record['frames_per_second']:.0f}",
                f"{record['times_real_time']:.1f}",
                f"{1e3 * record['processor_seconds'] / case.num_frames:.2f}",
                f"{record['peak_mb']:.0f}",
            )
    out.print(table)
    return records
