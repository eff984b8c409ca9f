"""What a model folder is made of: parts that are written anew and parts that are taken as they are."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import diffusers

from longtake.models.checkpoints.checkpoint import Checkpoint, TensorInfo
from longtake.models.checkpoints.writing import (
    DEFAULT_SHARD_BYTES,
    TRANSFORMER_STEM,
    OutputTensor,
    write_weights,
)

OnTensor = Callable[[OutputTensor], None]


class Part(Protocol):
    """A sub-folder of a diffusers pipeline."""

    name: str
    tensors: Sequence[OutputTensor]

    def write(self, folder: Path, *, max_shard_bytes: int, on_tensor: OnTensor | None) -> None:
        """Fill an existing, empty folder."""


@dataclass(frozen=True, kw_only=True)
class WrittenPart:
    """Weights that are renamed and written, beside a new ``config.json``.

    Attributes:
        name: ``transformer``, ``vae`` or ``text_encoder``.
        source: Where the weights are from, for messages.
        config: Content of its ``config.json``.
        tensors: Its weights.
        stem: Of the weight files' names.
        notes: (what, text) rows for the summary.
    """

    name: str
    source: str
    config: Mapping[str, Any]
    tensors: Sequence[OutputTensor]
    stem: str = TRANSFORMER_STEM
    notes: Sequence[tuple[str, str]] = ()

    def write(
        self, folder: Path, *, max_shard_bytes: int = DEFAULT_SHARD_BYTES, on_tensor: OnTensor | None = None
    ) -> None:
        """Write ``config.json`` and the weights.

        Raises:
            ValueError: If the weights are not finite.
        """
        write_json(folder / "config.json", self.config)
        try:
            write_weights(folder, self.tensors, stem=self.stem, max_shard_bytes=max_shard_bytes, on_tensor=on_tensor)
        except ValueError as error:
            raise ValueError(f"'{self.source}': {error}") from error


@dataclass(frozen=True, kw_only=True)
class TakenPart:
    """Files that are taken as they are.

    Attributes:
        name: ``vae``, ``text_encoder`` or ``tokenizer``.
        files: Linked, or copied where the new folder is on another disk.
        notes: (what, text) rows for the summary.
    """

    name: str
    files: Sequence[Path]
    notes: Sequence[tuple[str, str]] = ()
    tensors: Sequence[OutputTensor] = field(default=())

    def write(self, folder: Path, *, max_shard_bytes: int = 0, on_tensor: OnTensor | None = None) -> None:
        """Link or copy the files."""
        for file in self.files:
            # A hub cache holds links to its blobs; the new folder is not to depend on them.
            source = file.resolve()
            if source.stat().st_dev == folder.stat().st_dev:
                os.link(source, folder / file.name)
            else:
                shutil.copy2(source, folder / file.name)


def renamed(
    checkpoint: Checkpoint, entry: str, sources: Mapping[str, str], *, order: Sequence[str]
) -> list[OutputTensor]:
    """Describe tensors that only get another name.

    Args:
        checkpoint: Where they are read from.
        entry: In which entry.
        sources: New name to name in the checkpoint.
        order: New names, as they are to be written.

    Returns:
        One output each, dtype as stored.
    """

    def output(name: str) -> OutputTensor:
        source = sources[name]
        info: TensorInfo = checkpoint.entries[entry][source]
        return OutputTensor(name=name, info=info, load=lambda: checkpoint.read(entry, source))

    return [output(name) for name in order]


def stock_config(class_name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a diffusers ``config.json``."""
    return {"_class_name": class_name, "_diffusers_version": diffusers.__version__} | dict(sorted(arguments.items()))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file as diffusers does: indented, with a newline at the end."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
