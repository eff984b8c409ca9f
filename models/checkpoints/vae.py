"""Wan's own VAE file (``Wan2.1_VAE.pth``) as diffusers' ``AutoencoderKLWan``."""

import re
from collections.abc import Mapping
from itertools import count, takewhile
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from longtake.models.checkpoints.checkpoint import Checkpoint, TensorInfo, choose_entry
from longtake.models.checkpoints.identify import NUM_LATENT_CHANNELS_5B, identify, require_floats, strip_names
from longtake.models.checkpoints.parts import WrittenPart, renamed, stock_config
from longtake.models.checkpoints.shapes import check_shapes
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


def vae_name(name: str, *, num_res_blocks: int) -> str | None:
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


def vae_config(shapes: Mapping[str, tuple[int, ...]], *, path: object) -> dict[str, Any]:
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


def vae_part(checkpoint: Checkpoint) -> WrittenPart:
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
    config = vae_config({name: info.shape for name, info in infos.items()}, path=path)
    names = {name: vae_name(name, num_res_blocks=config["num_res_blocks"]) for name in stored}
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
