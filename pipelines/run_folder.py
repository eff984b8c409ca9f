"""A run on disk: configuration, video, log of blocks and saved states, so that it can be resumed and forked.

config.yaml          everything that decided the video; `--config` takes it
video.mp4            fragmented MP4, playable while it grows
blocks.jsonl         one line per finished block: hash of its frames, timings, cache size
run.json             seed, versions, machine, weights hash, start, status; the blocks too once the run has stopped
state.safetensors    the newest saved state; `states/` holds it and some earlier ones
"""

import fcntl
import os
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import yaml

from longtake.configs.loader import load_complete
from longtake.configs.run import RunConfig
from longtake.pipelines.run_files import BlockLog, read_json, write_atomic, write_json
from longtake.pipelines.run_state import SavedState, StateFolder
from longtake.pipelines.video_file import copy_frames

RUNNING = "running"
INTERRUPTED = "interrupted"
FINISHED = "finished"


class RunFolder:
    """One run's files. Open it with ``create`` or ``open``; both keep other processes out until ``close``."""

    def __init__(self, path: Path) -> None:
        """Name the files; nothing is read or written.

        Args:
            path: The folder.
        """
        self.path = path
        self.config_path = path / "config.yaml"
        self.record_path = path / "run.json"
        self.log_path = path / "blocks.jsonl"
        self.video_path = path / "video.mp4"
        self._lock: IO[bytes] | None = None

    @classmethod
    def create(cls, path: Path, *, config: RunConfig, record: Mapping[str, Any]) -> "RunFolder":
        """Make a new run's folder, all at once.

        Args:
            path: Must not exist, or be an empty folder.
            config: What decides the video.
            record: Versions, machine and weights; goes into ``run.json``.

        Raises:
            ValueError: If something is there already.
        """
        refuse_existing(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Filled under another name and renamed: a run's folder is complete from its first moment.
        draft = cls(path.with_name(f".{path.name}.{os.getpid()}.part"))
        draft.path.mkdir()
        try:
            draft._write_config(config)
            write_json(draft.record_path, _new_record(config, record))
            draft.path.rename(path)
        except BaseException:
            shutil.rmtree(draft.path, ignore_errors=True)
            raise
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Open an existing run for work.

        Args:
            path: The folder.

        Raises:
            ValueError: If it is no run's folder or another process works in it.
        """
        folder = cls(path)
        folder.check()
        folder._take_lock()
        for leftover in path.glob(".*.part"):
            leftover.unlink()
        return folder

    def check(self) -> None:
        """Refuse a path that is no run's folder.

        Raises:
            ValueError: Says which file is missing.
        """
        if not self.path.is_dir():
            raise ValueError(f"there is no folder {self.path}")
        for needed in (self.config_path, self.record_path):
            if not needed.is_file():
                raise ValueError(f"{self.path} is no run's folder: it has no {needed.name}")

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes in."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @property
    def config(self) -> RunConfig:
        """What decides the video, as it was saved."""
        return load_complete(self.config_path)

    @property
    def record(self) -> dict[str, Any]:
        """Contents of ``run.json``."""
        return read_json(self.record_path)

    @property
    def status(self) -> str:
        """``running`` (perhaps killed), ``interrupted`` or ``finished``."""
        return self.record["status"]

    @property
    def states(self) -> StateFolder:
        """The saved states."""
        num_kept = self.config.output.num_kept_states
        return StateFolder(self.path / "states", newest=self.path / "state.safetensors", num_kept=num_kept)

    def update_record(self, **changes: Any) -> None:
        """Change keys of ``run.json``."""
        write_json(self.record_path, self.record | changes)

    def latest_state(self) -> SavedState | None:
        """Read the newest saved state, or None where there is none yet."""
        states = self.states
        blocks = states.blocks()
        return states.load(blocks[-1]) if blocks else None

    def discard_after(self, state: SavedState | None) -> None:
        """Drop the video's frames when there is no state to go on from; otherwise the writer cuts it.

        Args:
            state: Where the run goes on.
        """
        if state is None or not state.num_frames:
            self.video_path.unlink(missing_ok=True)

    def _write_config(self, config: RunConfig) -> None:
        values = config.as_mapping()
        values["output"]["folder"] = None
        write_atomic(self.config_path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode())

    def _take_lock(self) -> None:
        self._lock = (self.path / "run.lock").open("ab")
        try:
            # Goes with the process, however that ends.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise ValueError(f"another process works in {self.path}: stop it or wait") from error


def refuse_existing(path: Path) -> None:
    """Refuse a place where something is.

    Args:
        path: Where a new run's folder is to be.

    Raises:
        ValueError: If something other than an empty folder is there.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    folder = RunFolder(path)
    is_run = folder.config_path.is_file() and folder.record_path.is_file()
    unfinished = is_run and folder.status != FINISHED
    remedy = f"go on with: longtake resume {path}" if unfinished else "choose another --out"
    raise ValueError(f"{path} exists and nothing is overwritten: {remedy}")


def fork_run(
    source: RunFolder, path: Path, *, config: RunConfig, at: float, record: Mapping[str, Any], num_ahead: int = 0
) -> RunFolder:
    """Make a new run that shares the beginning of another one.

    The newest state at or before the block where ``at`` falls is copied with its part of the video; blocks between
    that state and ``at`` are made again, and come out the same.

    Args:
        source: The run to branch from; may be unfinished.
        path: The new run's folder; must not exist.
        config: The new run's configuration: the source's up to ``at``.
        at: Seconds; the branch begins with the first block that starts at or after it.
        record: Versions, machine and weights.
        num_ahead: Blocks that a state has begun already beyond the next one.

    Raises:
        ValueError: If the source has not come that far, or ``path`` exists.
    """
    fps = source.record["video"]["fps"]
    block, frame = branch_point(source, at=at)
    starts = [number for number in source.states.blocks() if number <= max(0, block - num_ahead)]
    parent = {"folder": str(source.path), "at": at, "block": block, "frame": frame, "seconds": frame / fps}
    folder = RunFolder.create(path, config=config, record={**record, "parent": parent})
    try:
        if starts:
            _copy_beginning(source, folder, starts[-1])
    except BaseException:
        folder.close()
        shutil.rmtree(path, ignore_errors=True)
        raise
    return folder


def branch_point(source: RunFolder, *, at: float) -> tuple[int, int]:
    """Find the first block that starts at or after a time.

    Args:
        source: A run with at least one block.
        at: Seconds.

    Returns:
        (block index, its first pixel frame).

    Raises:
        ValueError: If the run has not come that far.
    """
    video = source.record["video"]
    start, num_blocks = 0, 0
    for entry in BlockLog.read(source.log_path):
        if starts_at(start, at=at, fps=video["fps"]):
            return entry["index"], start
        start += entry["num_frames"]
        num_blocks += 1
    if num_blocks and start < video["num_frames"] and starts_at(start, at=at, fps=video["fps"]):
        return num_blocks, start
    raise ValueError(f"{source.path} has {start / video['fps']:.2f} s: give --at a time within them")


def starts_at(frame: int, *, at: float, fps: float) -> bool:
    """Whether a block that starts with this pixel frame starts at or after ``at`` seconds."""
    return frame >= at * fps - 1e-6


def blocks_of(folder: RunFolder) -> list[dict[str, Any]]:
    """Read the log of a run's blocks."""
    return list(BlockLog.read(folder.log_path))


def now() -> str:
    """The time as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _copy_beginning(source: RunFolder, folder: RunFolder, state_block: int) -> None:
    state = source.states.load(state_block)
    if state.num_frames:
        copy_frames(source.video_path, folder.video_path, num_frames=state.num_frames)
    log = BlockLog(folder.log_path)
    for entry in BlockLog.read(source.log_path):
        if entry["index"] < state_block:
            log.append(entry)
    log.sync()
    log.close()
    folder.states.save(state)


def _new_record(config: RunConfig, record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "status": RUNNING,
        "created": now(),
        "prompt": config.prompt,
        "seed": config.seed,
        "parent": None,
        "start": None,
        **record,
        "sessions": [],
    }
