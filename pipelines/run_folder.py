"""A run on disk: configuration, video, log of blocks and checkpoints, so that it can be resumed and forked.

config.yaml          everything that decided the video; `--config` takes it
video.mp4            fragmented MP4, playable while it grows
blocks.jsonl         one line per finished block: hash of its frames, timings, cache size
run.json             seed, versions, machine, weights hash, start, status; the blocks too once the run has stopped
state.safetensors    the latest checkpoint; `states/` holds it and some earlier ones
"""

import fcntl
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from longtake.configs.loader import load_complete
from longtake.configs.run import RunConfig
from longtake.pipelines.checkpoint import Checkpoint, link_or_copy, read_json, with_temporary, write_json
from longtake.pipelines.video_file import copy_frames

RUNNING = "running"
INTERRUPTED = "interrupted"
FINISHED = "finished"

_PACKAGES = ("longtake", "torch", "diffusers", "transformers", "safetensors", "numpy", "av")
_OPTIONAL_PACKAGES = ("zentorch",)
_FULL_HASH_BYTES = 1 << 28
_NUM_SAMPLES, _SAMPLE_BYTES = 256, 1 << 16


@dataclass(frozen=True)
class _Checkpoints:
    """``states/NNNNNN.safetensors``, named by the next block; the newest is also the run's ``state.safetensors``."""

    folder: Path  # made when the first checkpoint is saved
    newest: Path
    num_kept: int

    def blocks(self) -> list[int]:
        """The checkpoints' next blocks, rising."""
        return sorted(int(path.stem) for path in self.folder.glob("[0-9]*.safetensors"))

    def path(self, next_block: int) -> Path:
        return self.folder / f"{next_block:06d}.safetensors"

    def load(self, next_block: int) -> Checkpoint:
        return Checkpoint.load(self.path(next_block))

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint atomically, then drop the most crowded of the older ones.

        One after the other those go whose neighbours are nearest to each other, so that the rest spreads over the
        video; never the newest, and never the one before block 0, without which a fork would need the file of the
        conditioning frames.
        """
        self.folder.mkdir(exist_ok=True)
        path = self.path(checkpoint.next_block)
        checkpoint.save(path)
        with_temporary(self.newest, lambda temporary: link_or_copy(path, temporary))
        blocks = self.blocks()
        kept = [block for block in blocks if block]
        while len(kept) > self.num_kept - (0 in blocks):
            gaps = [after - before for before, after in zip([0, *kept[:-2]], kept[1:], strict=True)]
            self.path(kept.pop(gaps.index(min(gaps)))).unlink(missing_ok=True)


class BlockLog:
    """One JSON line for every finished block, appended as it is finished; made if it is missing.

    A line that a kill cut short is dropped when the log is opened. A block that is made again, after a resume, must
    come out as its line says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_blocks = 0
        for entry in self.read(path):
            if entry["index"] != self.num_blocks:
                raise ValueError(f"{path}: line {self.num_blocks + 1} is block {entry['index']}: the log is damaged")
            self.num_blocks += 1
        self._file = path.open("ab", buffering=0)
        self.cut(self.num_blocks)

    @staticmethod
    def read(path: Path) -> Iterator[dict[str, Any]]:
        """Yield a log's blocks in order, none for a missing file; a line that is being written is left out."""
        if not path.exists():
            return
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    return
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}: line {number} is damaged: {error}") from error

    def append(self, entry: dict[str, Any]) -> None:
        """Add a block, a mapping with ``index`` and ``sha256``; refuse one that is known and came out different."""
        index = entry["index"]
        if index == self.num_blocks:
            self._file.write((json.dumps(entry, ensure_ascii=False) + "\n").encode())
            self.num_blocks += 1
        elif next(known for known in self.read(self.path) if known["index"] == index)["sha256"] != entry["sha256"]:
            raise ValueError(
                f"block {index} came out different from before the interruption: another machine, thread count or "
                "library version? Resume where it was made, or with --allow-changes"
            )

    def cut(self, num_blocks: int) -> None:
        """Keep ``num_blocks`` blocks and forget the others, so that they may come out differently."""
        with self.path.open("rb") as file:
            end = sum(len(line) for line, _ in zip(file, range(num_blocks), strict=False))
        self._file.truncate(end)
        self.num_blocks = min(self.num_blocks, num_blocks)

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class RunFolder:
    """One run's files; naming it reads and writes nothing.

    Open it with ``create`` or ``open``; both keep other processes out until ``close``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_path = path / "config.yaml"
        self.record_path = path / "run.json"
        self.log_path = path / "blocks.jsonl"
        self.video_path = path / "video.mp4"
        self._lock: IO[bytes] | None = None

    @classmethod
    def create(cls, path: Path, *, config: RunConfig, record: Mapping[str, Any]) -> "RunFolder":
        """Make a new run's folder, all at once; ``record`` (versions, machine, weights) goes into ``run.json``."""
        refuse_existing(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Filled under another name and renamed: a run's folder is complete from its first moment.
        draft = cls(path.with_name(f".{path.name}.{os.getpid()}.part"))
        draft.path.mkdir()
        try:
            values = config.as_mapping()
            values["output"]["folder"] = None
            text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
            with_temporary(draft.config_path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
            created = datetime.now(UTC).isoformat(timespec="seconds")
            first = {"status": RUNNING, "created": created, "prompt": config.prompt, "seed": config.seed}
            write_json(draft.record_path, first | {"parent": None, "start": None} | dict(record) | {"sessions": []})
            draft.path.rename(path)
        except BaseException:
            shutil.rmtree(draft.path, ignore_errors=True)
            raise
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Open an existing run for work."""
        folder = cls(path)
        folder.check()
        folder._lock = (path / "run.lock").open("ab")
        try:
            # Goes with the process, however that ends.
            fcntl.flock(folder._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            folder.close()
            raise ValueError(f"another process works in {path}: stop it or wait") from error
        for leftover in path.glob(".*.part"):
            leftover.unlink()
        return folder

    def check(self) -> None:
        """Refuse a path that is no run's folder with a ``ValueError`` that says what is missing."""
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
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @property
    def config(self) -> RunConfig:
        return load_complete(self.config_path)

    @property
    def record(self) -> dict[str, Any]:
        return read_json(self.record_path)

    @property
    def status(self) -> str:
        """``running`` (perhaps killed), ``interrupted`` or ``finished``."""
        return self.record["status"]

    @property
    def checkpoints(self) -> _Checkpoints:
        num_kept = self.config.output.num_kept_states
        return _Checkpoints(self.path / "states", self.path / "state.safetensors", num_kept)

    def update_record(self, **changes: Any) -> None:
        write_json(self.record_path, self.record | changes)

    def latest_checkpoint(self) -> Checkpoint | None:
        checkpoints = self.checkpoints
        blocks = checkpoints.blocks()
        return checkpoints.load(blocks[-1]) if blocks else None

    def blocks(self) -> list[dict[str, Any]]:
        return list(BlockLog.read(self.log_path))

    def branch_point(self, *, at: float) -> tuple[int, int]:
        """First block that starts at or after ``at`` seconds, and its first pixel frame."""
        video, frame, blocks = self.record["video"], 0, self.blocks()
        for entry in blocks:
            if _starts_at(frame, at=at, fps=video["fps"]):
                return entry["index"], frame
            frame += entry["num_frames"]
        if blocks and frame < video["num_frames"] and _starts_at(frame, at=at, fps=video["fps"]):
            return len(blocks), frame
        raise ValueError(f"{self.path} has {frame / video['fps']:.2f} s: give --at a time within them")

    def fork(
        self, path: Path, *, config: RunConfig, at: float, record: Mapping[str, Any], num_ahead: int = 0
    ) -> "RunFolder":
        """Make a new run that shares the beginning of this one.

        The branch begins with the first block that starts at or after ``at`` seconds. The latest checkpoint before it
        is copied with its part of the video; blocks in between are made again, and come out the same. ``num_ahead`` is
        how many blocks a checkpoint has begun beyond the next one.
        """
        block, frame = self.branch_point(at=at)
        starts = [number for number in self.checkpoints.blocks() if number <= max(0, block - num_ahead)]
        seconds = frame / self.record["video"]["fps"]
        parent = {"folder": str(self.path), "at": at, "block": block, "frame": frame, "seconds": seconds}
        folder = RunFolder.create(path, config=config, record={**record, "parent": parent})
        try:
            if starts:
                checkpoint = self.checkpoints.load(starts[-1])
                if checkpoint.num_frames:
                    copy_frames(self.video_path, folder.video_path, num_frames=checkpoint.num_frames)
                log = BlockLog(folder.log_path)
                for entry in self.blocks()[: checkpoint.next_block]:
                    log.append(entry)
                log.sync()
                log.close()
                folder.checkpoints.save(checkpoint)
        except BaseException:
            folder.close()
            shutil.rmtree(path, ignore_errors=True)
            raise
        return folder


def refuse_existing(path: Path) -> None:
    """Raise a ``ValueError`` if something other than an empty folder is where a new run is to be."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    folder = RunFolder(path)
    is_run = folder.config_path.is_file() and folder.record_path.is_file()
    unfinished = is_run and folder.status != FINISHED
    remedy = f"go on with: longtake resume {path}" if unfinished else "choose another --out"
    raise ValueError(f"{path} exists and nothing is overwritten: {remedy}")


def free_place(stem: Path) -> Path:
    """Return the first of STEM-1, STEM-2, ... where nothing is."""
    return next(path for number in count(1) if not (path := stem.with_name(f"{stem.name}-{number}")).exists())


def _starts_at(frame: int, *, at: float, fps: float) -> bool:
    """Tell if a block that starts with this pixel frame starts at or after ``at`` seconds."""
    return frame >= at * fps - 1e-6


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and properties of the machine that decide the numbers; ``device`` is the model's."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    packages = (*_PACKAGES, *(name for name in _OPTIONAL_PACKAGES if find_spec(name) is not None))
    return {
        "versions": {"python": platform.python_version()} | {package: version(package) for package in packages},
        "machine": {
            "platform": platform.platform(),
            "device": str(device),
            "device_name": name,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "num_threads": torch.get_num_threads(),
        },
    }


def weights_hash(folder: Path) -> dict[str, Any]:
    """Hash a model folder's weights: names, sizes and bytes of its safetensors files.

    Files above 256 MiB are read at 256 evenly spaced places of 64 KiB: enough to tell two checkpoints apart, and a
    run does not wait for tens of gigabytes. ``method`` of the result is then ``sampled``, otherwise ``full``.
    """
    digest = hashlib.sha256()
    sizes = {path: path.stat().st_size for path in sorted(folder.rglob("*.safetensors"))}
    for path, size in sizes.items():
        digest.update(f"{path.relative_to(folder).as_posix()}:{size}\n".encode())
        with path.open("rb") as file:
            if size <= _FULL_HASH_BYTES:
                while data := file.read(1 << 20):
                    digest.update(data)
                continue
            for index in range(_NUM_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * index // (_NUM_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    method = "sampled" if any(size > _FULL_HASH_BYTES for size in sizes.values()) else "full"
    values = {"num_files": len(sizes), "num_bytes": sum(sizes.values()), "method": method}
    return {"sha256": digest.hexdigest(), **values}


def file_hash(path: str | Path | None) -> dict[str, Any] | None:
    """SHA-256 and ``num_bytes`` of a whole file, or None; a ``ValueError`` if it is not there."""
    if path is None:
        return None
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist any more: put it back where the run found it.")
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "num_bytes": path.stat().st_size}
