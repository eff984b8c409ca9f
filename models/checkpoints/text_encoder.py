"""Wan's own text encoder file (``models_t5_umt5-xxl-enc-bf16.pth``) as transformers' ``UMT5EncoderModel``."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import UMT5Config, UMT5EncoderModel

from longtake.models.checkpoints.checkpoint import Checkpoint, TensorInfo, choose_entry
from longtake.models.checkpoints.identify import identify, require_floats, strip_names
from longtake.models.checkpoints.parts import WrittenPart, renamed
from longtake.models.checkpoints.shapes import check_shapes
from longtake.models.checkpoints.writing import TRANSFORMERS_STEM
from longtake.models.conversion import listing

_OUTSIDE = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}
# Below `blocks.<index>.`; the gate is the factor with the activation, wi_0.
_BLOCK = {
    "norm1.weight": "layer.0.layer_norm.weight",
    **{f"attn.{x}.weight": f"layer.0.SelfAttention.{x}.weight" for x in "qkvo"},
    "pos_embedding.embedding.weight": "layer.0.SelfAttention.relative_attention_bias.weight",
    "norm2.weight": "layer.1.layer_norm.weight",
    "ffn.gate.0.weight": "layer.1.DenseReluDense.wi_0.weight",
    "ffn.fc1.weight": "layer.1.DenseReluDense.wi_1.weight",
    "ffn.fc2.weight": "layer.1.DenseReluDense.wo.weight",
}
_BLOCK_NAME = re.compile(r"blocks\.(\d+)\.(.+)")
_TIED = "encoder.embed_tokens.weight"  # the same numbers as shared.weight, stored once


def text_encoder_name(name: str) -> str | None:
    """Translate a name of Wan's own text encoder.

    Args:
        name: Stripped of wrappers.

    Returns:
        The name in ``UMT5EncoderModel``, or None for an unknown one.

    Source: names of Wan2.1's T5 encoder and of transformers' class.
    """
    match = _BLOCK_NAME.fullmatch(name)
    if match is None:
        return _OUTSIDE.get(name)
    return f"encoder.block.{match[1]}.{_BLOCK[match[2]]}" if match[2] in _BLOCK else None


def text_encoder_config(shapes: Mapping[str, tuple[int, ...]], *, path: object) -> UMT5Config:
    """Find the configuration of the ``UMT5EncoderModel`` that has these weights.

    Args:
        shapes: Original name, stripped, to shape.
        path: For messages.

    Returns:
        The configuration.

    Raises:
        ValueError: If it is no complete text encoder.
    """
    try:
        vocab_size, d_model = shapes["token_embedding.weight"]
        num_buckets, num_heads = shapes["blocks.0.pos_embedding.embedding.weight"]
        d_inner, d_ff = shapes["blocks.0.attn.q.weight"][0], shapes["blocks.0.ffn.fc1.weight"][0]
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"'{path}' is no complete UMT5 text encoder: {error}.") from error
    return UMT5Config(
        vocab_size=vocab_size,
        d_model=d_model,
        d_kv=d_inner // num_heads,
        d_ff=d_ff,
        num_layers=len({match[1] for match in map(_BLOCK_NAME.fullmatch, shapes) if match}),
        num_heads=num_heads,
        relative_attention_num_buckets=num_buckets,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        architectures=["UMT5EncoderModel"],
    )


def text_encoder_part(checkpoint: Checkpoint) -> WrittenPart:
    """Describe the ``text_encoder`` folder of an original text encoder file.

    Args:
        checkpoint: Opened.

    Returns:
        The part, complete, every shape checked against transformers' class.

    Raises:
        ValueError: If it is something else, or incomplete.
    """
    path = checkpoint.path
    entry = choose_entry(checkpoint)
    stored = strip_names(path, checkpoint.entries[entry])
    infos: dict[str, TensorInfo] = {name: checkpoint.entries[entry][source] for name, source in stored.items()}
    found = identify(checkpoint.entries[entry])
    if found.kind != "text_encoder" or found.naming != "original":
        is_theirs = found.kind == "text_encoder"
        what = "a text encoder in transformers naming: give its folder, with config.json" if is_theirs else found.title
        raise ValueError(
            f"'{path}' is {what}; --text-encoder takes models_t5_umt5-xxl-enc-bf16.pth or a transformers folder."
        )
    require_floats(path, infos)
    unknown = [name for name in stored if text_encoder_name(name) is None]
    if unknown:
        raise ValueError(f"'{path}' has names that Wan's text encoder has not: {listing(unknown)} of {len(stored)}.")
    config = text_encoder_config({name: info.shape for name, info in infos.items()}, path=path)
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != _TIED}
    check_shapes({text_encoder_name(name): info.shape for name, info in infos.items()}, expected, path=path)
    sources = {text_encoder_name(name): source for name, source in stored.items()}
    tensors = renamed(checkpoint, entry, sources, order=list(expected))
    return WrittenPart(
        name="text_encoder",
        source=str(path),
        config=_content(config, tensors[0].info.dtype),
        tensors=tensors,
        stem=TRANSFORMERS_STEM,
        notes=[("text encoder", f"converted from {path.name}, {len(sources)} tensors")],
    )


def _content(config: UMT5Config, dtype: torch.dtype) -> dict[str, Any]:
    return config.to_dict() | {"dtype": str(dtype).removeprefix("torch.")}
