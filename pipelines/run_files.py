"""Files that a killed program never leaves half-written, and the log of finished blocks."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is either the old one or the new one, whatever happens.

    Args:
        path: The file.
        data: Its new contents.

    Raises:
        OSError: If it cannot be written; the old file is then untouched.
    """
    with_temporary(path, lambda temporary: temporary.write_bytes(data))


def with_temporary(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file under a temporary name, bring it to the disk, and rename it.

    Args:
        path: The final name.
        write: Called with the temporary path.

    Raises:
        OSError: If it cannot be written; ``path`` is then untouched and the temporary file is gone.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        write(temporary)
        _sync(temporary, os.O_RDWR)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent, os.O_RDONLY)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented, one line at the end."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        ValueError: If the file is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


class BlockLog:
    """One JSON line for every finished block, appended as it is finished.

    A line that a kill cut short is dropped when the log is opened. A block that is made again, after a resume, must
    come out as its line says.
    """

    def __init__(self, path: Path) -> None:
        """Open the log for appending.

        Args:
            path: ``blocks.jsonl``; made if it is missing.

        Raises:
            ValueError: If a line is damaged or a block is missing.
        """
        self.path = path
        self.num_blocks = 0
        self._drop_torn_line()
        for entry in self.read(path):
            if entry["index"] != self.num_blocks:
                raise ValueError(f"{path}: line {self.num_blocks + 1} is block {entry['index']}: the log is damaged")
            self.num_blocks += 1
        self._file = path.open("ab", buffering=0)

    @staticmethod
    def read(path: Path) -> Iterator[dict[str, Any]]:
        """Yield a log's blocks in order, one at a time; a line that is being written is left out.

        Args:
            path: ``blocks.jsonl``; a missing file has no blocks.

        Raises:
            ValueError: If a line is no JSON.
        """
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
        """Add a block, or check one that has been made again.

        Args:
            entry: JSON-able, with ``index`` and ``sha256``.

        Raises:
            ValueError: If the block is known and came out different.
        """
        index = entry["index"]
        if index < self.num_blocks:
            before = next(known for known in self.read(self.path) if known["index"] == index)
            if before["sha256"] != entry["sha256"]:
                raise ValueError(
                    f"block {index} came out different from before the interruption: another machine, thread count or "
                    "library version? Resume where it was made, or with --allow-changes"
                )
            return
        self._file.write((json.dumps(entry, ensure_ascii=False) + "\n").encode())
        self.num_blocks += 1

    def cut(self, num_blocks: int) -> None:
        """Forget all blocks from one on, so that they may come out differently.

        Args:
            num_blocks: Blocks to keep.
        """
        with self.path.open("rb") as file:
            end = sum(len(line) for line, _ in zip(file, range(num_blocks), strict=False))
        self._file.truncate(end)
        self.num_blocks = min(self.num_blocks, num_blocks)

    def sync(self) -> None:
        """Bring the log to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _drop_torn_line(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("r+b") as file:
            end = file.seek(0, os.SEEK_END)
            while end and not _ends_line(file, end):
                end -= 1
            file.truncate(end)


def _ends_line(file: BinaryIO, end: int) -> bool:
    file.seek(end - 1)
    return file.read(1) == b"\n"


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
