"""A checkpoint's transformer as diffusers' ``WanTransformer3DModel``: all is checked before anything is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from longtake.models.checkpoints.checkpoint import Checkpoint, TensorInfo, choose_entry
from longtake.models.checkpoints.identify import Identity, require_transformer
from longtake.models.checkpoints.lora import Adapter
from longtake.models.checkpoints.parts import WrittenPart, stock_config
from longtake.models.checkpoints.shapes import (
    check_shapes,
    config_beside,
    expected_shapes,
    known_size,
    read_config,
    transformer_config,
)
from longtake.models.checkpoints.writing import OutputTensor
from longtake.models.conversion import convert_original_state_dict


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """A complete transformer in a checkpoint.

    Attributes:
        checkpoint: Where it is.
        entry: In which entry.
        identity: What was recognised.
        config: Arguments of the ``WanTransformer3DModel`` that loads it.
        sources: Diffusers name to name in the checkpoint, in the class's order.
    """

    checkpoint: Checkpoint
    entry: str
    identity: Identity
    config: Mapping[str, Any]
    sources: Mapping[str, str]

    @property
    def source(self) -> str:
        """Path and entry, for messages."""
        return _title(self.checkpoint, self.entry)

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Diffusers name to shape and dtype as stored."""
        found = self.checkpoint.entries[self.entry]
        return {name: found[source] for name, source in self.sources.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Diffusers name to shape."""
        return {name: info.shape for name, info in self.infos.items()}

    @property
    def size(self) -> str | None:
        """``1.3B``, ``14B``, or None for any other."""
        return known_size(self.config)

    @property
    def is_image_to_video(self) -> bool:
        """Whether it attends to an image beside the text."""
        return self.config.get("added_kv_proj_dim") is not None

    def part(self, *, dtype: torch.dtype | None = None, adapter: Adapter | None = None) -> WrittenPart:
        """Describe the folder to write.

        Args:
            dtype: Of the written weights; as stored when None.
            adapter: Merged into them.

        Returns:
            The transformer's part of a pipeline folder.
        """
        tensors = [self._output(name, info, dtype, adapter) for name, info in self.infos.items()]
        model = _stock_arguments(self.config)
        return WrittenPart(
            name="transformer",
            source=self.source,
            config=stock_config("WanTransformer3DModel", model),
            tensors=tensors,
        )

    def _output(self, name: str, info: TensorInfo, dtype: torch.dtype | None, adapter: Adapter | None) -> OutputTensor:
        def load() -> Tensor:
            weight = self.checkpoint.read(self.entry, self.sources[name])
            return weight if adapter is None else adapter.merge(name, weight)

        return OutputTensor(name=name, info=TensorInfo(info.shape, dtype or info.dtype), load=load)


def find_transformer(checkpoint: Checkpoint, *, key: str | None = None, config: Path | None = None) -> Transformer:
    """Find the transformer of a checkpoint and check it against diffusers' class.

    Args:
        checkpoint: Opened.
        key: Entry; the first of ``ENTRY_ORDER`` that is there when None.
        config: A ``config.json``, Wan's own or diffusers', that says how many heads there are; the one beside the
            checkpoint when None, and heads of 128 without any.

    Returns:
        The transformer: every name is known and there, every shape right.

    Raises:
        ValueError: Says what it is instead, or lists what is missing, extra or misshapen.
    """
    entry = choose_entry(checkpoint, key)
    path = _title(checkpoint, entry)
    stored = checkpoint.entries[entry]
    identity = require_transformer(path, stored)
    try:
        sources = convert_original_state_dict({name: name for name in stored})
    except ValueError as error:
        raise ValueError(f"'{path}': {error}") from error
    shapes = {name: stored[source].shape for name, source in sources.items()}
    config = config or config_beside(checkpoint.folder)
    arguments = transformer_config(shapes, read_config(config) if config else {}, path=path)
    expected = expected_shapes(arguments)
    check_shapes(shapes, expected, path=path)
    ordered = {name: sources[name] for name in expected}
    return Transformer(checkpoint=checkpoint, entry=entry, identity=identity, config=arguments, sources=ordered)


def _title(checkpoint: Checkpoint, entry: str) -> str:
    return f"{checkpoint.path}:{entry}" if entry else str(checkpoint.path)


def _stock_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of the class, defaults included, as diffusers itself writes them."""
    with torch.device("meta"):
        model = WanTransformer3DModel(**config)
    found = {name: value for name, value in model.config.items() if not name.startswith("_")}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
