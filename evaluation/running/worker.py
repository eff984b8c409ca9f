"""The process that does units of work: it makes videos, measures them and writes their scores.

Started by the launchers as ``python -m longtake.evaluation.running.worker`` with the protocol's number of threads in
its environment, because numerical libraries read it once, when they are loaded: so the numbers are the same however
many workers there are and whoever starts them. Orders come as JSON lines on standard input, answers go to standard
output. When its input ends, the program that drives it is gone, and it ends too.
"""

import errno
import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from longtake.evaluation.records import ManifestLine, VideoScores, video_info, write_json
from longtake.evaluation.running.plan import Unit
from longtake.evaluation.running.protocol import Protocol

if TYPE_CHECKING:
    from longtake.evaluation.running.generation import Generator

Say = Callable[..., None]


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


def main() -> None:
    """Take orders until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    # Whatever libraries print must not be taken for an answer.
    os.dup2(2, 1)

    def say(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    orders = _follow(sys.stdin)
    setup = orders.get()
    try:
        worker = _set_up(setup)
        say(ready=worker.describe())
        while True:
            unit = Unit.from_json(orders.get()["unit"])
            worker.do(unit, on_steps=lambda steps: say(steps=steps))
            say(done=unit.number)
    except ValueError as error:
        say(error=str(error))
    except OSError as error:
        say(error=_describe(error), is_disk_full=error.errno in (errno.ENOSPC, errno.EDQUOT))
    except Exception:  # the process that drives this one raises it, with its traceback
        say(error=traceback.format_exc().strip().splitlines()[-1], traceback=traceback.format_exc())


def _set_up(setup: Mapping[str, Any]) -> Worker:
    import torch

    protocol = _protocol(setup["protocol"])
    torch.set_num_threads(protocol.threads)
    torch.set_num_interop_threads(1)
    torch.set_grad_enabled(False)
    worker = Worker(protocol, device=_device(protocol.device, setup["slot"], torch), keep_videos=setup["keep_videos"])
    worker.check([Unit.from_json(unit) for unit in setup["units"]])
    return worker


def _protocol(values: Mapping[str, Any]) -> Protocol:
    from longtake.configs.fields import build

    return build(Protocol, values, what="the protocol")


def _device(name: str, slot: int, torch: Any) -> str:
    if name != "cuda":
        return name
    if not torch.cuda.is_available():
        raise ValueError("device='cuda': this machine has no CUDA; use cpu")
    return f"cuda:{slot % torch.cuda.device_count()}"


def _follow(stream: IO[str]) -> "queue.Queue[dict[str, Any]]":
    """Read orders beside the work, so that the end of the input ends the process in the middle of a unit."""
    orders: queue.Queue[dict[str, Any]] = queue.Queue()

    def read() -> None:
        for line in stream:
            orders.put(json.loads(line))
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return orders


def _describe(error: OSError) -> str:
    where = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{where}"


if __name__ == "__main__":
    main()
