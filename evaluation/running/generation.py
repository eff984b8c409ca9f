"""Making the videos of an evaluation: one batch at a time, straight into files, which then are what is measured."""

import contextlib
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from longtake.configs.families import load_family
from longtake.evaluation.metric import Segment
from longtake.evaluation.records import ManifestLine, write_json
from longtake.evaluation.running.entries import is_sparse, split_entry
from longtake.evaluation.running.plan import Unit
from longtake.evaluation.running.protocol import Protocol, model_folder
from longtake.pipelines.long_video import LongVideoPipeline, VideoBlock, VideoRollout
from longtake.pipelines.video_file import VideoFormat, VideoWriter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class _Costs:
    """What a batch costs while it is made.

    Attributes:
        denoise: Processor seconds of denoising per block and video.
        num_bytes: Of keys and values after each block, per video.
        first_frame_s: From the prompt to the first frames, seconds.
        busy_s: Processor seconds of everything, per video.
        attention_density: Share of self-attention that was computed; None in an evaluation without sparse attention.
    """

    denoise: list[float]
    num_bytes: list[float]
    first_frame_s: float = 0.0
    busy_s: float = 0.0
    attention_density: float | None = None

    def summary(self) -> dict[str, float]:
        """Plain figures of the batch."""
        sparse = {} if self.attention_density is None else {"attention_density": self.attention_density}
        return sparse | {
            "ms_per_block": 1e3 * sum(self.denoise) / len(self.denoise),
            "kv_mb": self.num_bytes[-1] / 1e6,
            "kv_mb_peak": max(self.num_bytes) / 1e6,
            "first_frame_s": self.first_frame_s,
            "generation_cpu_s": self.busy_s,
        }


class Generator:
    """A model that makes units of work.

    Args:
        protocol: Resolved.
        device: Where it runs, e.g. ``cpu`` or ``cuda:1``.

    Raises:
        ValueError: If the model cannot be loaded, or a policy or the length does not fit it.
    """

    def __init__(self, protocol: Protocol, *, device: str) -> None:
        self.protocol = protocol
        self.pipe = _load(protocol, torch.device(device))
        self._has_sparse_runs = any(is_sparse(entry) for entry in (protocol.caches or {}).values())

    def check(self, units: Sequence[Unit]) -> None:
        """Refuse, before any work, what would fail in the middle of it.

        Raises:
            ValueError: If a prompt is too long for the model, or a policy cannot make videos of this length.
        """
        limit = self.pipe.family.max_sequence_length
        for text in dict.fromkeys(text for unit in units for prompt in unit.prompts for text in _texts(prompt)):
            num_tokens = len(self.pipe.tokenizer(text).input_ids)
            if num_tokens > limit:
                raise ValueError(
                    f"a prompt has {num_tokens} tokens, this model reads {limit}: shorten it, or give another list "
                    f"(it begins {text[:40]!r})"
                )
        first = {unit.label: unit for unit in reversed(units)}
        for label, unit in first.items():
            alone = replace(unit, lines=unit.lines[:1], prompts=unit.prompts[:1])
            try:
                self._start(alone)
            except ValueError as error:
                raise ValueError(f"cache {label!r}: {error}") from error

    def make(self, unit: Unit, *, on_share: Callable[[float], None]) -> tuple[ManifestLine, ...]:
        """Make a unit's videos and write down that they are whole.

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
        session = self._start(unit)
        form = VideoFormat(
            height=self.pipe.family.height,
            width=self.pipe.family.width,
            fps=session.fps,
            crf=self.protocol.crf,
            threads=self.protocol.threads,
        )
        costs, starts, num_frames = _Costs([], []), [], 0
        with _writers(paths, form) as (writers, finish):
            for chunk, seconds in self._chunks(session):
                if not starts:
                    costs.first_frame_s = time.perf_counter() - begin
                starts.append(num_frames)
                num_frames += chunk.frames.shape[1]
                costs.denoise.append(seconds / len(paths))
                costs.num_bytes.append(chunk.num_cache_bytes / len(paths))
                for writer, video in zip(writers, chunk.uint8(), strict=True):
                    writer.write(video)
                on_share(num_frames / session.num_frames)
            finish()
        costs.busy_s = (time.process_time() - begin_busy) / len(paths)
        if self._has_sparse_runs:
            # Dense runs beside sparse ones too: their 1 is what the others are compared with.
            costs.attention_density = session.attention_density
        lines = tuple(
            self._finished(line, path, form, num_frames, starts) for line, path in zip(unit.lines, paths, strict=True)
        )
        write_json(unit.record_path, {"lines": [line.to_json() for line in lines], "costs": costs.summary()})
        return lines

    def _start(self, unit: Unit) -> VideoRollout:
        protocol = self.protocol
        changes = zip(*(prompt.changes for prompt in unit.prompts), strict=True)
        schedule = [
            (same[0].start_s, [change.generated_from for change in same], protocol.segment_event) for same in changes
        ]
        cache, attention = split_entry((protocol.caches or {})[unit.label])
        session = self.pipe.start(
            [prompt.generated_from for prompt in unit.prompts],
            seconds=protocol.seconds,
            cache=dict(cache),
            attention=attention,
            sampler=dict(protocol.sampler) if protocol.sampler is not None else None,
            seed=[line.seed for line in unit.lines],
            schedule=schedule,
        )
        if schedule:
            session.rollout.settings.check_event(protocol.segment_event)
        return session

    def _chunks(self, session: VideoRollout) -> Iterator[tuple[VideoBlock, float]]:
        """Chunks with the processor time of their denoising, so that other work on the machine does not count."""
        while True:
            begin = time.process_time()
            with torch.no_grad():
                chunk = session.next_block()
            if chunk is None:
                return
            share = chunk.seconds["denoise"] / sum(chunk.seconds.values())
            yield chunk, share * (time.process_time() - begin)

    def _finished(
        self, line: ManifestLine, path: Path, form: VideoFormat, num_frames: int, starts: Sequence[int]
    ) -> ManifestLine:
        return replace(
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


@contextlib.contextmanager
def _writers(paths: Sequence[Path], form: VideoFormat) -> Iterator[tuple[list[VideoWriter], Callable[[], None]]]:
    """Writers to temporary names; ``finish`` closes the files and gives them their own.

    Yields:
        The writers, and ``finish``.
    """
    temporary = [path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}") for path in paths]
    writers: list[VideoWriter] = []

    def finish() -> None:
        for writer, here, path in zip(writers, temporary, paths, strict=True):
            writer.close()
            here.replace(path)

    with ExitStack() as stack:
        for here in temporary:
            here.parent.mkdir(parents=True, exist_ok=True)
            here.unlink(missing_ok=True)
            stack.callback(here.unlink, missing_ok=True)
            writers.append(VideoWriter(here, video_format=form))
            stack.callback(writers[-1].abandon)
        yield writers, finish


def _load(protocol: Protocol, device: torch.device) -> LongVideoPipeline:
    import diffusers
    import transformers
    from safetensors import SafetensorError

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    family = load_family(protocol.family) if protocol.family else load_family(protocol.model)
    try:
        pipe = LongVideoPipeline.from_pretrained(
            model_folder(protocol.model), family=family, dtype=DTYPES[protocol.dtype]
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"cannot load the model: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _texts(prompt: Any) -> list[str]:
    return [prompt.generated_from, *(change.generated_from for change in prompt.changes)]


def _real_segments(
    segments: Sequence[Segment], starts: Sequence[int], num_frames: int, fps: float
) -> tuple[Segment, ...]:
    """Segments from the blocks on in which their prompts took effect, the first at or after the wished time."""
    if not segments:
        return ()
    begins = []
    for segment in segments:
        frame = math.ceil(segment.start_s * fps - 1e-6)
        begins.append(next((start for start in starts if start >= frame), num_frames) / fps)
    ends = [*begins[1:], num_frames / fps]
    return tuple(
        replace(segment, start_s=begin, end_s=end)
        for segment, begin, end in zip(segments, begins, ends, strict=True)
        if end > begin
    )
