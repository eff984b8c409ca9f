"""A run from start to end: conditioning, video, log and checkpoints, from the start or from the latest checkpoint."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from longtake.configs.families import ModelFamily
from longtake.configs.run import RunConfig, StartConfig
from longtake.pipelines.checkpoint import Checkpoint
from longtake.pipelines.conditioning import Clip, ConditioningLatents, make_clip, make_stills, plan_cut
from longtake.pipelines.long_video import VideoBlock, VideoRollout
from longtake.pipelines.run_folder import FINISHED, INTERRUPTED, RUNNING, BlockLog, RunFolder
from longtake.pipelines.video_file import VideoFormat, VideoWriter, count_frames


class _TakenLatents(ConditioningLatents):
    """Conditioning latents that a checkpoint holds already; it has none to give."""

    def __init__(self, num_frames: int) -> None:
        self.num_frames = num_frames

    def take(self, num_frames: int) -> NoReturn:
        raise ValueError(
            f"the {self.num_frames} latent frames that this video goes on from are in none of its saved states: "
            "make it anew from its image or clip."
        )


def start_arguments(config: RunConfig, source: RunFolder | None = None) -> dict[str, Any]:
    """Conditioning arguments of ``LongVideoPipeline.start`` for a run; none where it has no start.

    ``source`` is its folder, or that of the run it is forked from. With a checkpoint in it the file is not needed any
    more; without one it has to be the one that the run began with.
    """
    start = config.start
    if start is None:
        return {}
    record = None if source is None else source.record["start"]
    if source is not None and record is not None and source.checkpoints.blocks():
        return {"include_start": start.include, "video_latents": _TakenLatents(record["num_latent_frames"])}
    clip = _open_start(start)
    if source is not None and record is not None and _sha256(start.path) != record["sha256"]:
        raise ValueError(f"{start.path} is not the file any more that {source.path} began with: restore it")
    return {"include_start": start.include, start.kind: clip}


def start_record(config: RunConfig, family: ModelFamily) -> dict[str, Any] | None:
    """Entry ``start`` of ``run.json``, made without any weights; None where the run has none."""
    start = config.start
    if start is None:
        return None
    clip = _open_start(start)
    size = {"height": config.height or family.height, "width": config.width or family.width}
    cut = plan_cut(clip, start.kind, family=family, **size)
    return {
        "kind": start.kind,
        "file": start.path,
        "sha256": _sha256(start.path),
        "size": [clip.height, clip.width],
        "num_file_frames": clip.num_frames,
        "file_fps": clip.fps,
        "first_file_frame": cut.indices[0],
        "num_latent_frames": cut.num_latent_frames,
        "num_frames": len(cut.indices),
        "seconds": len(cut.indices) / family.fps,
        "num_left_out": cut.num_left_out,
        "is_included": start.include,
    }


def _open_start(start: StartConfig) -> Clip:
    path = Path(start.path)
    return make_stills(path)[0] if start.kind == "image" else make_clip(path, seconds=start.seconds)


def _sha256(path: str) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, kw_only=True)
class Progress:
    """State of a run after a block, or at the end of a process's part of it."""

    status: str = RUNNING
    num_done: int = 0  # finished blocks, those of earlier processes included
    num_frames: int = 0  # pixel frames made so far, without the conditioning frames
    num_new_frames: int = 0  # pixel frames that this process made
    seconds: float = 0.0  # since this process began to make blocks
    num_tokens: int = 0  # in the cache, per layer and sample
    num_cache_bytes: int = 0  # read sets included

    @property
    def frames_per_second(self) -> float:
        return self.num_new_frames / self.seconds if self.seconds else 0.0


def run_video(
    folder: RunFolder,
    rollout: VideoRollout,
    *,
    on_block: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
    allow_changes: bool = False,
) -> Progress:
    """Make the blocks that a run still lacks and write them.

    The conditioning frames are taken in first and a checkpoint saved, so that their file is not needed again. Before
    every checkpoint the video and the log are flushed to the disk, so that a run killed at any moment resumes from
    its latest checkpoint with the frames it would have had.

    Args:
        folder: The run, opened.
        rollout: Started with the run's configuration, batch of one; the latest checkpoint is loaded here.
        on_block: Called after every block.
        should_stop: Asked after every block; true saves a checkpoint and ends this process's part.
        allow_changes: Take blocks that are made again as they come out, on another machine for example.

    Raises:
        ValueError: If a block that is made again comes out different.
        OSError: If the disk is full or cannot be written; the latest checkpoint stays.
    """
    run = _Run(folder, rollout, allow_changes=allow_changes)
    try:
        status = run.make_blocks(on_block, should_stop)
        run.close_video(is_finished=status == FINISHED)
    finally:
        run.log.close()
        if run.video is not None:
            run.video.abandon()
    run.record_end(status)
    # The last frame's way into the file included.
    return replace(run.progress, status=status, seconds=time.perf_counter() - run.started)


class _Run:
    def __init__(self, folder: RunFolder, rollout: VideoRollout, *, allow_changes: bool) -> None:
        self.folder, self.rollout, self.config = folder, rollout, folder.config
        self.began, self.started = datetime.now(UTC), time.perf_counter()
        self.log = BlockLog(folder.log_path)
        self.video: VideoWriter | None = None
        self.progress = Progress()
        self.num_changes = self.num_frames = 0
        self.first_block_seconds: float | None = None
        self.is_begun = False
        self._resume(allow_changes)
        self.first_block = rollout.next_block_index
        folder.update_record(
            status=RUNNING,
            video={
                "fps": rollout.fps,
                "num_frames": rollout.num_frames,
                "num_blocks": rollout.num_blocks,
                "seconds": rollout.num_frames / rollout.fps,
            },
            prompt_changes=rollout.prompt_changes,
        )

    def _resume(self, allow_changes: bool) -> None:
        checkpoint = self.folder.latest_checkpoint()
        if checkpoint is None or not checkpoint.num_frames:
            # Otherwise the writer cuts the video.
            self.folder.video_path.unlink(missing_ok=True)
        if allow_changes:
            self.log.cut(0 if checkpoint is None else checkpoint.next_block)
        if checkpoint is None:
            return
        if self.log.num_blocks < checkpoint.next_block:
            raise ValueError(
                f"{self.folder.log_path} ends at block {self.log.num_blocks}, the newest state is at block "
                f"{checkpoint.next_block}: the log was cut"
            )
        self.rollout.load_state_dict(checkpoint.tensors, checkpoint.numbers)
        self.num_frames, self.num_changes, self.is_begun = checkpoint.num_frames, checkpoint.num_changes, True

    def make_blocks(self, on_block: Callable[[Progress], None], should_stop: Callable[[], bool]) -> str:
        """Make blocks to the end or until a stop is asked for; return the run's status."""
        if self.rollout.num_start_frames and not self.is_begun and not self._observe(should_stop):
            return INTERRUPTED
        while True:
            self._change_prompt()
            block = self.rollout.next_block()
            if block is None:
                return FINISHED
            self._write(block)
            stops = should_stop() and not block.is_last
            if stops or (not block.is_last and self.progress.num_done % self.config.output.state_every_blocks == 0):
                self._save_checkpoint()
            on_block(self.progress)
            if stops:
                return INTERRUPTED

    def _observe(self, should_stop: Callable[[], bool]) -> bool:
        """Take in the conditioning frames; false where a stop was asked for before their end."""
        digest = hashlib.sha256()
        for block in self.rollout.observe():
            if should_stop():
                return False
            frames = block.uint8()[0]
            digest.update(frames.tobytes())
            if self.rollout.include_start:
                self._append(frames)
        start = (self.folder.record["start"] or {}) | {"frames_sha256": digest.hexdigest()}
        self.folder.update_record(start=start)
        self._save_checkpoint()
        return True

    def _change_prompt(self) -> None:
        for change in self.config.prompt_changes[self.num_changes :]:
            if not self.rollout.is_due(change.at):
                return
            self.rollout.change_prompt(change.prompt, event=change.event, at=change.at)
            self.num_changes += 1
            self.folder.update_record(prompt_changes=self.rollout.prompt_changes)

    def _write(self, block: VideoBlock) -> None:
        started = time.perf_counter()
        frames = block.uint8()[0]
        digest = hashlib.sha256(frames.tobytes()).hexdigest()
        self._append(frames)
        if self.first_block_seconds is None:
            self.first_block_seconds = time.perf_counter() - self.started
        seconds = {**block.seconds, "write": time.perf_counter() - started}
        self.log.append(
            {
                "index": block.index,
                "start_frame": block.start_frame,
                "num_frames": len(frames),
                "sha256": digest,
                "seconds": {key: round(value, 5) for key, value in seconds.items()},
                "num_tokens": block.stats.num_tokens,
                "num_cache_bytes": block.num_cache_bytes,
            }
        )
        self.progress = Progress(
            num_done=block.index + 1,
            num_frames=self.num_frames - self._num_shown_frames,
            num_new_frames=self.progress.num_new_frames + len(frames),
            seconds=time.perf_counter() - self.started,
            num_tokens=block.stats.num_tokens,
            num_cache_bytes=block.num_cache_bytes,
        )

    def _append(self, frames: np.ndarray) -> None:
        if self.video is None:
            _, height, width, _ = frames.shape
            fps, output = self.rollout.fps, self.config.output
            form = VideoFormat(height=height, width=width, fps=fps, crf=output.crf, scale=output.scale)
            self.video = VideoWriter(self.folder.video_path, video_format=form, num_frames=self.num_frames)
        self.video.write(frames)
        self.num_frames += len(frames)

    def _save_checkpoint(self) -> None:
        if self.video is not None:
            self.video.flush()
        self.log.sync()
        tensors, numbers = self.rollout.state_dict()
        self.folder.checkpoints.save(
            Checkpoint(
                next_block=self.rollout.next_block_index,
                num_frames=self.num_frames,
                num_changes=self.num_changes,
                tensors=tensors,
                numbers=numbers,
            )
        )

    @property
    def _num_shown_frames(self) -> int:
        """Conditioning frames in the file, in pixel frames."""
        return self.rollout.num_start_frames if self.rollout.include_start else 0

    def close_video(self, *, is_finished: bool) -> None:
        """Close the file and count its frames."""
        if self.video is not None:
            self.video.close()
        expected = self.rollout.num_frames + self._num_shown_frames if is_finished else self.num_frames
        written = count_frames(self.folder.video_path) if self.num_frames else 0
        if written != expected:
            raise OSError(
                f"{self.folder.video_path} holds {written} frames instead of {expected}: something else changed it; "
                "delete it and states/, then resume"
            )

    def record_end(self, status: str) -> None:
        """Write the process's part into ``run.json``."""
        part = {
            "began": self.began.isoformat(timespec="seconds"),
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "status": status,
            "first_block": self.first_block,
            "num_blocks": self.rollout.next_block_index - self.first_block,
            "num_frames": self.progress.num_new_frames,
            "seconds": round(time.perf_counter() - self.started, 3),
            "first_block_seconds": self.first_block_seconds and round(self.first_block_seconds, 3),
            "attention_density": round(self.rollout.attention_density, 4),
        }
        self.folder.update_record(
            status=status,
            positions=self.rollout.positions.as_mapping(),
            sessions=[*self.folder.record["sessions"], part],
            blocks=self.folder.blocks(),
        )
