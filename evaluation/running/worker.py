"""Work of one process of an evaluation: make videos, measure them and write their scores.

The process that plans the evaluation hands :func:`start_process`, :func:`set_up` and :func:`do_unit` to a pool of
such processes, see ``launchers.py``.
"""

import errno
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longtake.evaluation.records import ManifestLine, VideoScores, video_info, write_json
from longtake.evaluation.running.plan import Unit
from longtake.evaluation.running.protocol import Protocol

if TYPE_CHECKING:
    from longtake.evaluation.running.generation import Generator


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Settings of every worker.

    Attributes:
        protocol: Resolved, with paths that work from any folder.
        keep_videos: Whether generated videos stay when they are measured; those that the report shows always do.
        units: Everything that is to be done, to be checked before any work.
    """

    protocol: Protocol
    keep_videos: bool
    units: Sequence[Unit]


class Worker:
    """What a worker process holds between units.

    Args:
        protocol: Resolved.
        device: Where networks run.
        keep_videos: Whether generated videos stay when they are measured; those that the report shows always do.

    Raises:
        ValueError: If a backbone cannot be loaded.
    """

    def __init__(self, protocol: Protocol, *, device: str, keep_videos: bool) -> None:
        from longtake.evaluation.backbones import classical_backbones, load_backbones
        from longtake.evaluation.metrics import make_metrics

        self.protocol = protocol
        self.device = device
        self.keep_videos = keep_videos
        path = protocol.backbones
        backbones = classical_backbones() if path is None else load_backbones(Path(path), device=device)
        self.files = dict(backbones.files)
        self.metrics, self.skipped = make_metrics(backbones, groups=protocol.metrics)
        self._generator: Generator | None = None

    def describe(self) -> dict[str, Any]:
        """What is measured, for the run's record."""
        specs = [asdict(spec) for metric in self.metrics for spec in metric.specs]
        return {"specs": specs, "skipped": dict(self.skipped), "files": self.files}

    def check(self, units: Sequence[Unit]) -> None:
        """Load the model if one is needed, and refuse what would fail later.

        Raises:
            ValueError: If the model, a prompt or a policy does not fit.
        """
        to_make = [unit for unit in units if unit.is_generated and not unit.videos_exist(unit.finished_lines())]
        if to_make:
            self._make_generator().check(to_make)

    def do(self, unit: Unit, *, on_steps: Callable[[float], None]) -> None:
        """Make what a unit lacks: its videos, if they are generated and not whole, then missing scores.

        Args:
            unit: The work.
            on_steps: Called with the steps that are done, of ``unit.num_steps``.

        Raises:
            ValueError: If a video cannot be read.
            OSError: If the disk is full.
        """
        lines, steps = unit.finished_lines(), 0.0
        is_measured = bool(lines) and all(unit.is_measured(line) for line in lines)
        if unit.is_generated:
            if not unit.videos_exist(lines) and (self.keep_videos or not is_measured):
                lines = self._make_generator().make(unit, on_share=lambda share: on_steps(share * len(unit.lines)))
            steps = float(len(unit.lines))
            on_steps(steps)
        for line in lines:
            if not unit.is_measured(line):
                write_json(unit.score_path(line), self.measure(unit, line).to_json())
            steps += 1
            on_steps(steps)
        if unit.is_generated and not self.keep_videos:
            for line in lines:
                if not line.is_shown:
                    (unit.folder / line.file).unlink(missing_ok=True)

    def measure(self, unit: Unit, line: ManifestLine) -> VideoScores:
        """Every metric on one video's file.

        Raises:
            ValueError: If the file cannot be read, or is not what its line says.
        """
        from longtake.evaluation.metrics.dimensions import of_own_prompts
        from longtake.evaluation.video import VideoSource, measure

        path = unit.folder / line.file
        source = VideoSource.open(path, fps=line.fps if path.is_dir() else None)
        if source.num_frames != line.num_frames:
            raise ValueError(
                f"{path} has {source.num_frames} frames, its manifest says {line.num_frames}: it was changed since; "
                "run the same command again"
            )
        info = video_info(
            line, num_frames=source.num_frames, fps=source.fps, height=source.height, width=source.width, path=path
        )
        return VideoScores(video=line, scores=of_own_prompts(measure(source, info, self.metrics), line.dimensions))

    def _make_generator(self) -> "Generator":
        if self._generator is None:
            from longtake.evaluation.running.generation import Generator

            self._generator = Generator(self.protocol, device=self.device)
        return self._generator


_worker: Worker | None = None
_steps: "connection.Connection | None" = None


def start_process(steps: "connection.Connection") -> None:
    """Prepare a process of a pool before its first order.

    Args:
        steps: Takes the steps that are done of the current unit.
    """
    global _steps
    _steps = steps
    # Signals of a terminal and of torchrun are for the planning process, which lets this one finish its unit.
    os.setsid()
    # The planning process's standard output is for results, not for what libraries print.
    os.dup2(2, 1)
    planning = parent_process()
    if planning is not None:
        threading.Thread(target=_end_with, args=(planning.sentinel,), daemon=True).start()


def set_up(setup: Setup, slot: int) -> dict[str, Any]:
    """Load networks and model, and refuse what would fail later.

    Args:
        setup: Of every worker.
        slot: Number among the workers of this machine; chooses the GPU.

    Returns:
        What is measured: ``specs``, ``skipped`` and ``files``.

    Raises:
        ValueError: If a backbone, the model, a prompt or a policy does not fit.
    """
    import torch

    global _worker
    with _plain_errors("the setup"):
        torch.set_num_threads(setup.protocol.threads)
        torch.set_num_interop_threads(1)
        torch.set_grad_enabled(False)
        device = _device(setup.protocol.device, slot, torch)
        _worker = Worker(setup.protocol, device=device, keep_videos=setup.keep_videos)
        _worker.check(setup.units)
        return _worker.describe()


def do_unit(unit: Unit) -> None:
    """Make and measure what a unit lacks.

    Raises:
        ValueError: If it cannot be done; says what to do about it.
        RuntimeError: If the program is at fault; with the traceback.
    """
    with _plain_errors(unit.title):
        if _worker is None:
            raise RuntimeError("the worker is not set up")
        _worker.do(unit, on_steps=_steps.send if _steps is not None else lambda steps: None)


@contextmanager
def _plain_errors(what: str) -> Iterator[None]:
    """Raise only errors that survive the way to another process, as those of many libraries do not."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error)) from None
    except OSError as error:
        text = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            text = (
                f"the disk is full ({text}); finished work is kept: free some space, then run the same command again"
            )
        raise ValueError(text) from None
    except Exception:
        raise RuntimeError(f"a worker failed in {what}:\n{traceback.format_exc()}") from None


def _device(name: str, slot: int, torch: Any) -> str:
    if name != "cuda":
        return name
    if not torch.cuda.is_available():
        raise ValueError("device='cuda': this machine has no CUDA; use cpu")
    return f"cuda:{slot % torch.cuda.device_count()}"


def _end_with(sentinel: int) -> None:
    """End this process, even in the middle of a unit, when the planning one is gone."""
    connection.wait([sentinel])
    os._exit(1)
