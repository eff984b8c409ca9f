""""""

import re
from collections.abc import Mapping
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from transformers import UMT5Config, UMT5EncoderModel

from longtake.models.checkpoints.checkpoint import Checkpoint, TensorInfo, choose_entry
from longtake.models.checkpoints.files import open_checkpoint, open_shards, read_json
from longtake.models.checkpoints.identify import NUM_LATENT_CHANNELS_5B, identify, require_floats, strip_names
from longtake.models.checkpoints.parts import TRANSFORMERS_STEM, Part, TakenPart, WrittenPart, renamed, stock_config
from longtake.models.checkpoints.transformer import check_shapes
from longtake.models.conversion import listing

_NUM_LATENT_CHANNELS = 16  # what the latents' published mean and deviation are for
_RESIDUAL = {
    "residual.0.gamma": "norm1.gamma",
    "residual.3.gamma": "norm2.gamma",
    **{f"residual.2.{x}": f"conv1.{x}" for x in ("weight", "bias")},
    **{f"residual.6.{x}": f"conv2.{x}" for x in ("weight", "bias")},
    **{f"shortcut.{x}": f"conv_shortcut.{x}" for x in ("weight", "bias")},
}
_RESAMPLE = {f"{part}.{x}": f"{part}.{x}" for part in ("resample.1", "time_conv") for x in ("weight", "bias")}
_ATTENTION = {"norm.gamma": "norm.gamma"} | {
    f"{part}.{x}": f"{part}.{x}" for part in ("to_qkv", "proj") for x in ("weight", "bias")
}
_OUTSIDE = {
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    **{f"{side}.conv1": f"{side}.conv_in" for side in ("encoder", "decoder")},
    **{f"{side}.head.2": f"{side}.conv_out" for side in ("encoder", "decoder")},
}
_OUTSIDE_NAMES = {f"{old}.{x}": f"{new}.{x}" for old, new in _OUTSIDE.items() for x in ("weight", "bias")} | {
    f"{side}.head.0.gamma": f"{side}.norm_out.gamma" for side in ("encoder", "decoder")
}
_MIDDLE = re.compile(r"(encoder|decoder)\.middle\.([012])\.(.+)")
_DOWN = re.compile(r"encoder\.downsamples\.(\d+)\.(.+)")
_UP = re.compile(r"decoder\.upsamples\.(\d+)\.(.+)")


def _vae_name(name: str, *, num_res_blocks: int) -> str | None:
    """Translate a name of Wan's own VAE.

    Args:
        name: Stripped of wrappers.
        num_res_blocks: Residual blocks per stage of the encoder; the decoder has one more.

    Returns:
        The name in ``AutoencoderKLWan``, or None for an unknown one.

    Source: names of Wan2.1's VAE and of diffusers' class.
    """
    if match := _MIDDLE.fullmatch(name):
        side, index, inside = match.groups()
        rows, place = (_ATTENTION, "attentions.0") if index == "1" else (_RESIDUAL, f"resnets.{int(index) // 2}")
        return f"{side}.mid_block.{place}.{rows[inside]}" if inside in rows else None
    if match := _DOWN.fullmatch(name):
        inside = (_RESIDUAL | _RESAMPLE).get(match[2])
        return None if inside is None else f"encoder.down_blocks.{match[1]}.{inside}"
    if match := _UP.fullmatch(name):
        # A stage of the decoder is one run of residual blocks and the upsampler behind them.
        stage, index = divmod(int(match[1]), num_res_blocks + 2)
        is_residual = index <= num_res_blocks
        inside = (_RESIDUAL if is_residual else _RESAMPLE).get(match[2])
        place = f"resnets.{index}" if is_residual else "upsamplers.0"
        return None if inside is None else f"decoder.up_blocks.{stage}.{place}.{inside}"
    return _OUTSIDE_NAMES.get(name)


def _vae_config(shapes: Mapping[str, tuple[int, ...]], *, path: object) -> dict[str, Any]:
    """Find the arguments of the ``AutoencoderKLWan`` that has these weights.

    Args:
        shapes: Original name, stripped, to shape.
        path: For messages.

    Returns:
        Arguments; statistics of the latents are the class's own, which are Wan2.1's.

    Raises:
        ValueError: If it is no VAE of Wan2.1.
    """
    try:
        num_channels, base = shapes["conv2.weight"][0], shapes["encoder.conv1.weight"][0]
    except (KeyError, IndexError) as error:
        raise ValueError(f"'{path}' is no complete Wan VAE: it lacks {error}.") from error
    if num_channels == NUM_LATENT_CHANNELS_5B:
        raise ValueError(f"'{path}' is the VAE of Wan2.2-TI2V-5B; Wan2.1's ({_NUM_LATENT_CHANNELS} channels) fits.")
    if num_channels != _NUM_LATENT_CHANNELS:
        raise ValueError(
            f"'{path}' has {num_channels} latent channels, whose mean and deviation are not published as Wan's "
            f"{_NUM_LATENT_CHANNELS} are: give its diffusers folder, which holds them."
        )
    stages: list[list[tuple[int, ...]]] = [[]]
    temporal = []
    block = "encoder.downsamples.{}."
    for index in takewhile(lambda i: any(name.startswith(block.format(i)) for name in shapes), count()):
        convolution = shapes.get(f"{block.format(index)}residual.6.weight")
        if convolution is not None:
            stages[-1].append(convolution)
        else:
            temporal.append(f"{block.format(index)}time_conv.weight" in shapes)
            stages.append([])
    if not all(stages):
        raise ValueError(f"'{path}' is no Wan2.1 VAE: its encoder has a stage without residual blocks.")
    return {
        "base_dim": base,
        "z_dim": num_channels,
        "dim_mult": [stage[-1][0] // base for stage in stages],
        "num_res_blocks": len(stages[0]),
        "temperal_downsample": temporal,
    }


def _vae_part(checkpoint: Checkpoint) -> WrittenPart:
    """Describe the ``vae`` folder of an original VAE file.

    Args:
        checkpoint: Opened.

    Returns:
        The part, complete, every shape checked against diffusers' class.

    Raises:
        ValueError: If it is something else, or incomplete.
    """
    path = checkpoint.path
    entry = choose_entry(checkpoint)
    stored = strip_names(path, checkpoint.entries[entry])
    infos: dict[str, TensorInfo] = {name: checkpoint.entries[entry][source] for name, source in stored.items()}
    found = identify(checkpoint.entries[entry])
    if found.kind != "vae" or found.naming != "original":
        what = "a VAE in diffusers naming: give its folder, with config.json" if found.kind == "vae" else found.title
        raise ValueError(f"'{path}' is {what}; --vae takes Wan2.1_VAE.pth or a diffusers folder.")
    require_floats(path, infos)
    config = _vae_config({name: info.shape for name, info in infos.items()}, path=path)
    names = {name: _vae_name(name, num_res_blocks=config["num_res_blocks"]) for name in stored}
    unknown = [name for name, new in names.items() if new is None]
    if unknown:
        raise ValueError(f"'{path}' has names that Wan2.1's VAE has not: {listing(unknown)} of {len(names)}.")
    with torch.device("meta"):
        model = AutoencoderKLWan(**config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_shapes({names[name]: info.shape for name, info in infos.items()}, expected, path=path)
    arguments = {name: value for name, value in model.config.items() if not name.startswith("_")}
    sources = {names[name]: source for name, source in stored.items()}
    return WrittenPart(
        name="vae",
        source=str(path),
        config=stock_config("AutoencoderKLWan", arguments),
        tensors=renamed(checkpoint, entry, sources, order=list(expected)),
        notes=[("vae", f"converted from {path.name}, {len(sources)} tensors")],
    )


_TEXT_ENCODER_OUTSIDE = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}
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


def _text_encoder_name(name: str) -> str | None:
    """Translate a name of Wan's own text encoder.

    Args:
        name: Stripped of wrappers.

    Returns:
        The name in ``UMT5EncoderModel``, or None for an unknown one.

    Source: names of Wan2.1's T5 encoder and of transformers' class.
    """
    match = _BLOCK_NAME.fullmatch(name)
    if match is None:
        return _TEXT_ENCODER_OUTSIDE.get(name)
    return f"encoder.block.{match[1]}.{_BLOCK[match[2]]}" if match[2] in _BLOCK else None


def _text_encoder_config(shapes: Mapping[str, tuple[int, ...]], *, path: object) -> UMT5Config:
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


def _text_encoder_part(checkpoint: Checkpoint) -> WrittenPart:
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
    unknown = [name for name in stored if _text_encoder_name(name) is None]
    if unknown:
        raise ValueError(f"'{path}' has names that Wan's text encoder has not: {listing(unknown)} of {len(stored)}.")
    config = _text_encoder_config({name: info.shape for name, info in infos.items()}, path=path)
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != _TIED}
    check_shapes({_text_encoder_name(name): info.shape for name, info in infos.items()}, expected, path=path)
    sources = {_text_encoder_name(name): source for name, source in stored.items()}
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


def find_vae(path: Path) -> Part:
    """Take a VAE: a diffusers folder as it is, or Wan's own file converted.

    Args:
        path: ``vae`` folder, folder of a whole pipeline, or ``Wan2.1_VAE.pth``.

    Raises:
        ValueError: If it is something else.
    """
    if not path.is_dir():
        return _vae_part(open_checkpoint(path))
    folder = _inside(path, "vae")
    config = _config(folder)
    if config.get("_class_name") != "AutoencoderKLWan":
        raise ValueError(f"'{folder}' is no Wan VAE: its config.json names {config.get('_class_name')!r}.")
    return TakenPart(name="vae", files=_weight_files(folder), notes=[("vae", f"taken from {folder}")])


def find_text_encoder(path: Path) -> Part:
    """Take a text encoder: a transformers folder as it is, or Wan's own file converted.

    Args:
        path: ``text_encoder`` folder, folder of a whole pipeline, or ``models_t5_umt5-xxl-enc-bf16.pth``.

    Raises:
        ValueError: If it is something else.
    """
    if not path.is_dir():
        return _text_encoder_part(open_checkpoint(path))
    folder = _inside(path, "text_encoder")
    config = _config(folder)
    if config.get("model_type") != "umt5":
        raise ValueError(f"'{folder}' is no UMT5 text encoder: its config.json says {config.get('model_type')!r}.")
    files = _weight_files(folder)
    return TakenPart(name="text_encoder", files=files, notes=[("text encoder", f"taken from {folder}")])


def find_tokenizer(path: Path) -> Part:
    """Take a tokenizer's folder as it is.

    Args:
        path: ``tokenizer`` folder (Wan's own: ``google/umt5-xxl``), or folder of a whole pipeline.

    Raises:
        ValueError: If it is something else.
    """
    folder = _inside(path, "tokenizer")
    files = sorted(file for file in folder.glob("*") if file.suffix in (".json", ".model") and file.is_file())
    if not {"tokenizer.json", "spiece.model"} & {file.name for file in files}:
        raise ValueError(f"'{folder}' holds no tokenizer: tokenizer.json or spiece.model is needed.")
    return TakenPart(name="tokenizer", files=files, notes=[("tokenizer", f"taken from {folder}")])


def part_config(part: Part) -> dict[str, Any]:
    """Return a part's ``config.json``, written or taken."""
    if isinstance(part, TakenPart):
        return read_json(next(file for file in part.files if file.name == "config.json"))
    return dict(part.config)


def _inside(path: Path, part: str) -> Path:
    if not path.is_dir():
        raise ValueError(f"'{path}' is no folder; --{part.replace('_', '-')} takes one.")
    return path / part if (path / "model_index.json").is_file() else path


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise ValueError(f"'{folder}' has no config.json: it is no diffusers or transformers folder.")
    return read_json(folder / "config.json")


def _weight_files(folder: Path) -> list[Path]:
    shards = open_shards(folder)  # refuses what is truncated or lacks shards
    if shards is None:
        raise ValueError(f"'{folder}' holds no .safetensors weights; pickles are not taken as they are.")
    return [*sorted(folder.glob("*.json")), *shards.files]
