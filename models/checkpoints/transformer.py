"""A checkpoint's transformer as diffusers' ``WanTransformer3DModel``: all is checked before anything is read."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from math import prod
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from longtake.models.checkpoints.checkpoint import Checkpoint, TensorInfo, choose_entry
from longtake.models.checkpoints.files import read_json
from longtake.models.checkpoints.identify import Identity, require_transformer
from longtake.models.checkpoints.lora import Adapter
from longtake.models.checkpoints.parts import OutputTensor, WrittenPart, stock_config
from longtake.models.conversion import convert_original_state_dict, listing

Shape = tuple[int, ...]

HEAD_DIM = 128  # all of Wan's models
# Sizes with a name: width, width of the feed-forward, layers.
SIZES = {(1536, 8960, 30): "1.3B", (5120, 13824, 40): "14B"}
_FROM_ORIGINAL = {
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "text_dim": "text_dim",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "num_layers": "num_layers",
    "num_heads": "num_attention_heads",
    "eps": "eps",
}
_CLASSES = ("WanTransformer3DModel", "WanModel", "CausalWanModel")


def _known_size(config: Mapping[str, Any]) -> str | None:
    """Name a transformer's size.

    Args:
        config: Of a ``WanTransformer3DModel``.

    Returns:
        ``1.3B`` or ``14B``; None for any other.
    """
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return SIZES.get((width, config["ffn_dim"], config["num_layers"]))


def _read_config(path: Path) -> dict[str, Any]:
    """Read a transformer's ``config.json``, Wan's own or diffusers'.

    Args:
        path: The file.

    Returns:
        What it says, under the names of ``WanTransformer3DModel``.

    Raises:
        ValueError: If it describes no Wan transformer.
    """
    found = read_json(path)
    if "num_attention_heads" in found and "attention_head_dim" in found:
        known = signature(WanTransformer3DModel.__init__).parameters
        return {key: value for key, value in found.items() if key in known and value is not None}
    if "num_heads" in found and "dim" in found:
        width, heads = found["dim"], found["num_heads"]
        if not isinstance(width, int) or not isinstance(heads, int) or heads < 1 or width % heads:
            raise ValueError(f"'{path}' says dim={width}, no multiple of num_heads={heads}.")
        config = {new: found[old] for old, new in _FROM_ORIGINAL.items() if old in found}
        return config | {"attention_head_dim": width // heads}
    raise ValueError(
        f"'{path}' describes no Wan transformer: it has neither num_heads and dim (Wan's own) nor num_attention_heads "
        "and attention_head_dim (diffusers)."
    )


def _config_beside(folder: Path) -> Path | None:
    """Find the ``config.json`` of a Wan transformer in a folder; one of something else is passed by."""
    path = folder / "config.json"
    if path.is_file() and read_json(path).get("_class_name") in _CLASSES:
        return path
    return None


def _transformer_config(shapes: Mapping[str, Shape], given: Mapping[str, Any], *, path: object) -> dict[str, Any]:
    """Find the arguments of the ``WanTransformer3DModel`` that has these weights.

    Args:
        shapes: Diffusers name to shape, complete.
        given: What ``_read_config`` found; the head's width is in no shape, all else has to agree with the shapes.
        path: For messages.

    Returns:
        Arguments for the class.

    Raises:
        ValueError: If the two disagree, or the heads are not known.
    """

    def shape(name: str, rank: int) -> Shape:
        if len(shapes[name]) != rank:
            raise ValueError(
                f"'{path}' has {name} of shape {list(shapes[name])}: a Wan transformer's has {rank} axes."
            )
        return shapes[name]

    patch = shape("patch_embedding.weight", 5)
    (width,) = shape("patch_embedding.bias", 1)
    layers = {int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")}
    config = {
        "patch_size": list(patch[2:]),
        "in_channels": patch[1],
        "out_channels": shape("proj_out.bias", 1)[0] // prod(patch[2:]),
        "text_dim": _other(shape("condition_embedder.text_embedder.linear_1.weight", 2), width),
        "freq_dim": _other(shape("condition_embedder.time_embedder.linear_1.weight", 2), width),
        "ffn_dim": _most(shape(f"blocks.{layer}.ffn.net.0.proj.bias", 1)[0] for layer in layers),
        "num_layers": len(layers),
        "cross_attn_norm": True,
    }
    image = "condition_embedder.image_embedder."
    if f"{image}norm1.bias" in shapes:
        config |= {"image_dim": shape(f"{image}norm1.bias", 1)[0], "added_kv_proj_dim": width}
    if f"{image}pos_embed" in shapes:
        config |= {"pos_embed_seq_len": shape(f"{image}pos_embed", 3)[1]}
    head_dim = given.get("attention_head_dim", HEAD_DIM)
    if not isinstance(head_dim, int) or head_dim < 1 or width % head_dim:
        raise ValueError(
            f"'{path}' is {width} wide, no multiple of the {head_dim} that a head of Wan has: say the number of heads "
            "with its config.json (--config)."
        )
    config |= {"num_attention_heads": width // head_dim, "attention_head_dim": head_dim}
    odd = [f"{k}={given[k]} but {v}" for k, v in config.items() if k in given and not _equal(given[k], v)]
    if odd:
        raise ValueError(f"'{path}': config.json says {', '.join(odd)} by the shapes: it belongs to another model.")
    return dict(given) | config


def expected_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Return what a ``WanTransformer3DModel`` of this configuration holds, name to shape, in the class's order."""
    with torch.device("meta"):
        model = WanTransformer3DModel(**config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def check_shapes(found: Mapping[str, Shape], expected: Mapping[str, Shape], *, path: object) -> None:
    """Refuse weights that are not exactly those expected.

    Args:
        found: Name to shape.
        expected: The same of the class that will load them.
        path: For messages.

    Raises:
        ValueError: Lists missing, extra and misshapen names with their counts.
    """
    missing, extra = expected.keys() - found.keys(), found.keys() - expected.keys()
    odd = [
        f"{name} is {list(found[name])}, should be {list(expected[name])}{_remark(found[name], expected[name])}"
        for name in expected.keys() & found.keys()
        if found[name] != expected[name]
    ]
    faults = [f"{len(odd)} misshapen: {'; '.join(sorted(odd)[:3])}{'; ...' if len(odd) > 3 else ''}"] if odd else []
    faults += [f"missing: {listing(missing)}"] if missing else []
    faults += [f"extra: {listing(extra)}"] if extra else []
    if faults:
        raise ValueError(f"'{path}' does not fit its model: {'; '.join(faults)}. Nothing was written.")


def _remark(found: Shape, expected: Shape) -> str:
    return " (transposed)" if len(found) > 1 and found == expected[::-1] else ""


def _other(shape: Shape, width: int) -> int:
    """The axis that is not the model's width, whichever way round the weight lies."""
    return shape[0] if len(shape) > 1 and shape[1] == width else shape[-1]


def _most(values: Any) -> int:
    return Counter(values).most_common(1)[0][0]


def _equal(given: Any, found: Any) -> bool:
    return (list(given) if isinstance(given, list | tuple) else given) == found


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
        return _known_size(self.config)

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
    config = config or _config_beside(checkpoint.folder)
    arguments = _transformer_config(shapes, _read_config(config) if config else {}, path=path)
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
