"""Work of one process of an evaluation: make videos, measure them and write their scores.

The process that plans the evaluation hands :func:`start_process`, :func:`set_up` and :func:`do_unit` to a pool of
such processes, see ``launchers.py``. Videos go straight into files, and the files are what is measured.
"""

import errno
import hashlib
import math
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from longtake.configs.families import load_family
from longtake.evaluation.metric import Segment
from longtake.evaluation.records import ManifestLine, VideoScores, video_info, write_json
from longtake.evaluation.running.plan import Unit
from longtake.evaluation.running.protocol import ATTENTION, Protocol, model_folder, split_entry
from longtake.evaluation.running.runner import Setup
from longtake.pipelines.video_file import VideoFormat, VideoWriter

if TYPE_CHECKING:
    from longtake.pipelines.long_video import LongVideoPipeline, VideoBlock, VideoRollout


class Worker:
    """Networks, metrics and model that a process keeps between units.

    Args:
        setup: Of every worker.
        device: Where networks run, e.g. ``cpu`` or ``cuda:1``.

    Raises:
        ValueError: If a backbone, the model, a prompt or a policy does not fit.
    """

    def __init__(self, setup: Setup, *, device: str) -> None:
        from longtake.evaluation.backbones import classical_backbones, load_backbones
        from longtake.evaluation.metrics import make_metrics

        self.setup = setup
        self.device = device
        path = setup.protocol.backbones
        backbones = classical_backbones() if path is None else load_backbones(Path(path), device=device)
        self.files = dict(backbones.files)
        self.metrics, self.skipped = make_metrics(backbones, groups=setup.protocol.metrics)
        to_make = [unit for unit in setup.units if unit.is_generated and not unit.videos_exist(unit.finished_lines())]
        if to_make:
            self.generator.check(to_make)

    @cached_property
    def generator(self) -> "Generator":
        """Model that makes videos, loaded when the first is missing."""
        return Generator(self.setup.protocol, device=self.device)

    def describe(self) -> dict[str, Any]:
        """``specs``, ``skipped`` and ``files`` of what is measured."""
        specs = [asdict(spec) for metric in self.metrics for spec in metric.specs]
        return {"specs": specs, "skipped": dict(self.skipped), "files": self.files}

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
            if not unit.videos_exist(lines) and (self.setup.keep_videos or not is_measured):
                lines = self.generator.make(unit, on_share=lambda share: on_steps(share * len(unit.lines)))
            steps = float(len(unit.lines))
            on_steps(steps)
        for line in lines:
            if not unit.is_measured(line):
                write_json(unit.score_path(line), self._measure(unit, line).to_json())
            steps += 1
            on_steps(steps)
        if unit.is_generated and not self.setup.keep_videos:
            for line in lines:
                if not line.is_shown:
                    (unit.folder / line.file).unlink(missing_ok=True)

    def _measure(self, unit: Unit, line: ManifestLine) -> VideoScores:
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


class Generator:
    """A model that makes the videos of units.

    Args:
        protocol: Resolved.
        device: Where it runs.

    Raises:
        ValueError: If the model cannot be loaded.
    """

    def __init__(self, protocol: Protocol, *, device: str) -> None:
        self.protocol = protocol
        self.pipe = _load(protocol, device)
        self._has_sparse_runs = any(ATTENTION in entry for entry in (protocol.caches or {}).values())

    def check(self, units: Sequence[Unit]) -> None:
        """Refuse, before any work, what would fail in the middle of it.

        Raises:
            ValueError: If a prompt is too long for the model, or a policy cannot make videos of this length.
        """
        limit = self.pipe.family.max_sequence_length
        prompts = [part for unit in units for prompt in unit.prompts for part in (prompt, *prompt.changes)]
        for text in dict.fromkeys(prompt.generated_from for prompt in prompts):
            num_tokens = len(self.pipe.tokenizer(text).input_ids)
            if num_tokens > limit:
                raise ValueError(
                    f"a prompt has {num_tokens} tokens, this model reads {limit}: shorten it, or give another list "
                    f"(it begins {text[:40]!r})"
                )
        for label, unit in {unit.label: unit for unit in reversed(units)}.items():
            try:
                self._start(replace(unit, lines=unit.lines[:1], prompts=unit.prompts[:1]))
            except ValueError as error:
                raise ValueError(f"cache {label!r}: {error}") from error

    def make(self, unit: Unit, *, on_share: Callable[[float], None]) -> tuple[ManifestLine, ...]:
        """Make a unit's videos and write down that they are whole, and what they cost.

        Args:
            unit: What to make.
            on_share: Called with the share that is finished, 0 to 1.

        Returns:
            The videos' lines, complete.

        Raises:
            OSError: If the disk is full; no half video is left under its name.
        """
        paths = [unit.folder / line.file for line in unit.lines]
        begin, begin_busy = time.perf_counter(), time.process_time()
        rollout = self._start(unit)
        family = self.pipe.family
        form = VideoFormat(
            height=family.height,
            width=family.width,
            fps=rollout.fps,
            crf=self.protocol.crf,
            threads=self.protocol.threads,
        )
        denoise, num_bytes, starts, num_frames, first_frame_s = [], [], [], 0, 0.0
        with ExitStack() as stack:
            writers = [stack.enter_context(_whole_video(path, form)) for path in paths]
            for block, seconds in _blocks(rollout):
                first_frame_s = first_frame_s or time.perf_counter() - begin
                starts.append(num_frames)
                num_frames += block.frames.shape[1]
                denoise.append(seconds / len(paths))
                num_bytes.append(block.num_cache_bytes / len(paths))
                for writer, video in zip(writers, block.uint8(), strict=True):
                    writer.write(video)
                on_share(num_frames / rollout.num_frames)
        # Processor time of denoising only, so that other work on the machine does not count.
        costs = {
            "ms_per_block": 1e3 * sum(denoise) / len(denoise),
            "kv_mb": num_bytes[-1] / 1e6,
            "kv_mb_peak": max(num_bytes) / 1e6,
            "first_frame_s": first_frame_s,
            "generation_cpu_s": (time.process_time() - begin_busy) / len(paths),
        }
        if self._has_sparse_runs:
            # Dense runs beside sparse ones too: their 1 is what the others are compared with.
            costs["attention_density"] = rollout.attention_density
        lines = tuple(
            replace(
                line,
                num_frames=num_frames,
                fps=float(form.fps),
                height=form.height,
                width=form.width,
                chunk_starts=tuple(starts),
                segments=_real_segments(line.segments, starts, num_frames, form.fps),
                encoder={"codec": "h264", "crf": form.crf, "pix_fmt": "yuv420p"},
                sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            )
            for line, path in zip(unit.lines, paths, strict=True)
        )
        write_json(unit.record_path, {"lines": [line.to_json() for line in lines], "costs": costs})
        return lines

    def _start(self, unit: Unit) -> "VideoRollout":
        protocol = self.protocol
        changes = zip(*(prompt.changes for prompt in unit.prompts), strict=True)
        schedule = [
            (same[0].start_s, [change.generated_from for change in same], protocol.segment_event) for same in changes
        ]
        cache, attention = split_entry((protocol.caches or {})[unit.label])
        rollout = self.pipe.start(
            [prompt.generated_from for prompt in unit.prompts],
            seconds=protocol.seconds,
            cache=dict(cache),
            attention=attention,
            sampler=None if protocol.sampler is None else dict(protocol.sampler),
            seed=[line.seed for line in unit.lines],
            schedule=schedule,
        )
        if schedule:
            rollout.rollout.settings.check_event(protocol.segment_event)
        return rollout


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
        ``specs``, ``skipped`` and ``files`` of what is measured.

    Raises:
        ValueError: If a backbone, the model, a prompt or a policy does not fit.
    """
    global _worker
    with _plain_errors("the setup"):
        torch.set_num_threads(setup.protocol.threads)
        torch.set_num_interop_threads(1)
        torch.set_grad_enabled(False)
        device = setup.protocol.device
        if device == "cuda":
            if not torch.cuda.is_available():
                raise ValueError("device='cuda': this machine has no CUDA; use cpu")
            device = f"cuda:{slot % torch.cuda.device_count()}"
        _worker = Worker(setup, device=device)
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


def _end_with(sentinel: int) -> None:
    """End this process, even in the middle of a unit, when the planning one is gone."""
    connection.wait([sentinel])
    os._exit(1)


@contextmanager
def _whole_video(path: Path, form: VideoFormat) -> Iterator[VideoWriter]:
    """Write a video under a temporary name, and give it its own when it is whole."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.unlink(missing_ok=True)
    writer = VideoWriter(temporary, video_format=form)
    try:
        yield writer
        writer.close()
        temporary.replace(path)
    finally:
        writer.abandon()
        temporary.unlink(missing_ok=True)


def _blocks(rollout: "VideoRollout") -> "Iterator[tuple[VideoBlock, float]]":
    """Blocks, each with the processor seconds of its denoising."""
    while True:
        begin = time.process_time()
        with torch.no_grad():
            block = rollout.next_block()
        if block is None:
            return
        share = block.seconds["denoise"] / sum(block.seconds.values())
        yield block, share * (time.process_time() - begin)


def _load(protocol: Protocol, device: str) -> "LongVideoPipeline":
    import diffusers
    import transformers
    from safetensors import SafetensorError

    from longtake.pipelines.long_video import LongVideoPipeline

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    family, dtype = load_family(protocol.family or protocol.model), getattr(torch, protocol.dtype)
    try:
        pipe = LongVideoPipeline.from_pretrained(model_folder(protocol.model), family=family, dtype=dtype)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"cannot load the model: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _real_segments(
    segments: Sequence[Segment], starts: Sequence[int], num_frames: int, fps: float
) -> tuple[Segment, ...]:
    """Segments from the blocks on in which their prompts took effect, the first at or after the wished time."""
    begins = []
    for segment in segments:
        frame = math.ceil(segment.start_s * fps - 1e-6)
        begins.append(next((start for start in starts if start >= frame), num_frames) / fps)
    ends = [*begins[1:], num_frames / fps]
    return tuple(
        replace(segment, start_s=begin, end_s=end)
        for segment, begin, end in zip(segments, begins, ends, strict=False)
        if end > begin
    )
