"""Drive a session into a run's folder: video, log, states; from the start or from the newest state."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from longtake.pipelines.run_files import BlockLog
from longtake.pipelines.run_folder import FINISHED, INTERRUPTED, RUNNING, RunFolder, now
from longtake.pipelines.run_state import SavedState
from longtake.pipelines.take import Chunk, TakeSession
from longtake.pipelines.video_file import VideoFormat, VideoWriter, count_frames


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is, after a block.

    Attributes:
        num_done: Finished blocks, those of earlier processes included.
        num_blocks: Blocks of the whole video.
        num_frames: Pixel frames made so far; what the video goes on from is not counted.
        num_new_frames: Pixel frames that this process made.
        seconds: Time since this process began to make blocks.
        num_tokens: Tokens in the cache, per layer and sample.
        num_cache_bytes: Bytes of the cache, read sets included.
    """

    num_done: int
    num_blocks: int
    num_frames: int
    num_new_frames: int
    seconds: float
    num_tokens: int
    num_cache_bytes: int

    @property
    def frames_per_second(self) -> float:
        """Pixel frames per second of this process's time."""
        return self.num_new_frames / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended: status, and where it was."""

    status: str
    progress: Progress | None


def run_take(
    folder: RunFolder,
    session: TakeSession,
    *,
    on_block: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
    allow_changes: bool = False,
) -> Outcome:
    """Make the blocks that a run still lacks and write them.

    What the video goes on from is taken in first and its state saved, so that it is not needed again.

    Before every saved state the video and the log are flushed to the disk, so that a run killed at any moment goes on
    from its newest state with the frames it would have had.

    Args:
        folder: The run, opened.
        session: Started with the run's configuration, batch of one; its saved state is loaded here.
        on_block: Called after every block.
        should_stop: Asked after every block; true saves a state and ends this process's part.
        allow_changes: Take blocks that are made again as they come out, on another machine for example.

    Returns:
        ``finished``, or ``interrupted`` where ``should_stop`` said so.

    Raises:
        ValueError: If a block that is made again comes out different.
        OSError: If the disk is full or cannot be written; the newest saved state stays.
    """
    run = _Run(folder, session, allow_changes=allow_changes)
    try:
        outcome = run.blocks(on_block, should_stop)
        outcome = run.close_video(outcome)
    finally:
        run.close()
    run.record_end(outcome)
    return outcome


class _Run:
    """One process's part of a run."""

    def __init__(self, folder: RunFolder, session: TakeSession, *, allow_changes: bool) -> None:
        self.folder, self.session = folder, session
        self.config = folder.config
        self.began = now()
        self.started = time.perf_counter()
        self.log = BlockLog(folder.log_path)
        self.video: VideoWriter | None = None
        self.num_changes = self.num_frames = self.num_new_frames = 0
        self.first_block_seconds: float | None = None
        self.is_begun = False
        self._go_on(allow_changes)
        self.first_block = session.next_block_index
        folder.update_record(
            status=RUNNING,
            video={
                "fps": session.fps,
                "num_frames": session.num_frames,
                "num_blocks": session.num_blocks,
                "seconds": session.num_frames / session.fps,
            },
            prompt_changes=session.prompt_changes,
        )

    def _go_on(self, allow_changes: bool) -> None:
        state = self.folder.latest_state()
        self.folder.discard_after(state)
        if allow_changes:
            self.log.cut(0 if state is None else state.next_block)
        if state is None:
            return
        if self.log.num_blocks < state.next_block:
            raise ValueError(
                f"{self.folder.log_path} ends at block {self.log.num_blocks}, the newest state is at block "
                f"{state.next_block}: the log was cut"
            )
        self.session.load_state_dict(state.tensors, state.numbers)
        self.num_frames, self.num_changes, self.is_begun = state.num_frames, state.num_changes, True

    def blocks(self, on_block: Callable[[Progress], None], should_stop: Callable[[], bool]) -> Outcome:
        progress = None
        if self.session.num_start_frames and not self.is_begun and not self._observe(should_stop):
            return Outcome(status=INTERRUPTED, progress=None)
        while True:
            self._change_prompt()
            chunk = self.session.next_chunk()
            if chunk is None:
                return Outcome(status=FINISHED, progress=progress)
            self._write(chunk)
            progress = self._progress(chunk)
            stops = should_stop() and not chunk.is_last
            if stops or (not chunk.is_last and progress.num_done % self.config.output.state_every_blocks == 0):
                self._save_state()
            on_block(progress)
            if stops:
                return Outcome(status=INTERRUPTED, progress=progress)

    def _observe(self, should_stop: Callable[[], bool]) -> bool:
        """Take in what the video goes on from; false where a stop was asked for before its end."""
        digest = hashlib.sha256()
        for chunk in self.session.observe():
            if should_stop():
                return False
            frames = chunk.uint8()[0]
            digest.update(np.ascontiguousarray(frames))
            if self.session.include_start:
                self._append(frames)
        start = (self.folder.record["start"] or {}) | {"frames_sha256": digest.hexdigest()}
        self.folder.update_record(start=start)
        self._save_state()
        return True

    def _change_prompt(self) -> None:
        changes = self.config.prompt_changes
        while self.num_changes < len(changes):
            change = changes[self.num_changes]
            if not self.session.is_due(change.at):
                return
            self.session.change_prompt(change.prompt, event=change.event, at=change.at)
            self.num_changes += 1
            self.folder.update_record(prompt_changes=self.session.prompt_changes)

    def _write(self, chunk: Chunk) -> None:
        started = time.perf_counter()
        frames = chunk.uint8()[0]
        digest = hashlib.sha256(np.ascontiguousarray(frames)).hexdigest()
        self._append(frames)
        self.num_new_frames += len(frames)
        if self.first_block_seconds is None:
            self.first_block_seconds = time.perf_counter() - self.started
        seconds = {**chunk.seconds, "write": time.perf_counter() - started}
        entry = {
            "index": chunk.index,
            "start_frame": chunk.start_frame,
            "num_frames": len(frames),
            "sha256": digest,
            "seconds": {key: round(value, 5) for key, value in seconds.items()},
            "num_tokens": chunk.stats.num_tokens,
            "num_cache_bytes": chunk.num_cache_bytes,
        }
        self.log.append(entry)

    def _append(self, frames: np.ndarray) -> None:
        if self.video is None:
            self.video = self._open_video(frames)
        self.video.write(frames)
        self.num_frames += len(frames)

    def _open_video(self, frames: np.ndarray) -> VideoWriter:
        _, height, width, _ = frames.shape
        output = self.config.output
        video_format = VideoFormat(
            height=height, width=width, fps=self.session.fps, crf=output.crf, scale=output.scale
        )
        return VideoWriter(self.folder.video_path, video_format=video_format, num_frames=self.num_frames)

    def _save_state(self) -> None:
        if self.video is not None:
            self.video.flush()
        self.log.sync()
        tensors, numbers = self.session.state_dict()
        self.folder.states.save(
            SavedState(
                next_block=self.session.next_block_index,
                num_frames=self.num_frames,
                num_changes=self.num_changes,
                tensors=tensors,
                numbers=numbers,
            )
        )

    def _progress(self, chunk: Chunk) -> Progress:
        return Progress(
            num_done=chunk.index + 1,
            num_blocks=self.session.num_blocks,
            num_frames=self.num_frames - self.num_shown_frames,
            num_new_frames=self.num_new_frames,
            seconds=time.perf_counter() - self.started,
            num_tokens=chunk.stats.num_tokens,
            num_cache_bytes=chunk.num_cache_bytes,
        )

    @property
    def num_shown_frames(self) -> int:
        """Pixel frames of the file that come from what the video goes on from."""
        return self.session.num_start_frames if self.session.include_start else 0

    def close_video(self, outcome: Outcome) -> Outcome:
        """Close and count; the outcome's time then includes the last frame's way into the file."""
        if self.video is not None:
            self.video.close()
        made = self.session.num_frames + self.num_shown_frames
        expected = made if outcome.status == FINISHED else self.num_frames
        written = count_frames(self.folder.video_path) if self.num_frames else 0
        if written != expected:
            raise OSError(
                f"{self.folder.video_path} holds {written} frames instead of {expected}: something else changed it; "
                "delete it and states/, then resume"
            )
        if outcome.progress is None:
            return outcome
        return replace(outcome, progress=replace(outcome.progress, seconds=time.perf_counter() - self.started))

    def close(self) -> None:
        self.log.close()
        if self.video is not None:
            self.video.abandon()

    def record_end(self, outcome: Outcome) -> None:
        part = {
            "began": self.began,
            "ended": now(),
            "status": outcome.status,
            "first_block": self.first_block,
            "num_blocks": self.session.next_block_index - self.first_block,
            "num_frames": self.num_new_frames,
            "seconds": round(time.perf_counter() - self.started, 3),
            "first_block_seconds": self.first_block_seconds and round(self.first_block_seconds, 3),
            "attention_density": round(self.session.attention_density, 4),
        }
        record: dict[str, Any] = self.folder.record
        self.folder.update_record(
            status=outcome.status,
            positions=self.session.positions.as_mapping(),
            sessions=[*record["sessions"], part],
            blocks=list(BlockLog.read(self.folder.log_path)),
        )
