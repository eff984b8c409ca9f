"""Parts of a Wan pipeline in diffusers' layout, found in files of any naming and checked before anything is read."""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from inspect import signature
from math import prod
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from longtake.models.checkpoints.files import (
    Checkpoint,
    TensorInfo,
    choose_entry,
    open_checkpoint,
    open_shards,
    read_json,
)
from longtake.models.checkpoints.identify import (
    NUM_LATENT_CHANNELS_5B,
    Identity,
    identify,
    require_floats,
    require_transformer,
)
from longtake.models.checkpoints.lora import Adapter
from longtake.models.checkpoints.parts import OutputTensor, Part
from longtake.models.conversion import convert_original_state_dict, listing, shape_faults, strip_wrappers

Shape = tuple[int, ...]

_HEAD_DIM = 128  # all of Wan's models
# Sizes with a name: width, width of the feed-forward, layers.
_SIZES = {(1536, 8960, 30): "1.3B", (5120, 13824, 40): "14B"}
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


def _read_config(path: Path) -> dict[str, Any]:
    """Read a transformer's ``config.json``, Wan's own or diffusers', under the names of ``WanTransformer3DModel``."""
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


def _transformer_config(shapes: Mapping[str, Shape], given: Mapping[str, Any], *, path: object) -> dict[str, Any]:
    """Find the arguments of the ``WanTransformer3DModel`` that has these weights.

    The head's width is in no shape: it is that of the ``given`` config, with which all else has to agree.
    """

    def shape(name: str, rank: int) -> Shape:
        if len(shapes[name]) != rank:
            raise ValueError(
                f"'{path}' has {name} of shape {list(shapes[name])}: a Wan transformer's has {rank} axes."
            )
        return shapes[name]

    def other_axis(name: str) -> int:
        """Not the model's width, whichever way round the weight lies."""
        first, last = shape(name, 2)
        return first if last == width else last

    patch = shape("patch_embedding.weight", 5)
    (width,) = shape("patch_embedding.bias", 1)
    layers = {int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")}
    widths = [shape(f"blocks.{layer}.ffn.net.0.proj.bias", 1)[0] for layer in layers]
    config = {
        "patch_size": list(patch[2:]),
        "in_channels": patch[1],
        "out_channels": shape("proj_out.bias", 1)[0] // prod(patch[2:]),
        "text_dim": other_axis("condition_embedder.text_embedder.linear_1.weight"),
        "freq_dim": other_axis("condition_embedder.time_embedder.linear_1.weight"),
        "ffn_dim": Counter(widths).most_common(1)[0][0],
        "num_layers": len(layers),
        "cross_attn_norm": True,
    }
    image = "condition_embedder.image_embedder."
    if f"{image}norm1.bias" in shapes:
        config |= {"image_dim": shape(f"{image}norm1.bias", 1)[0], "added_kv_proj_dim": width}
    if f"{image}pos_embed" in shapes:
        config |= {"pos_embed_seq_len": shape(f"{image}pos_embed", 3)[1]}
    head_dim = given.get("attention_head_dim", _HEAD_DIM)
    if not isinstance(head_dim, int) or head_dim < 1 or width % head_dim:
        raise ValueError(
            f"'{path}' is {width} wide, no multiple of the {head_dim} that a head of Wan has: say the number of heads "
            "with its config.json (--config)."
        )
    config |= {"num_attention_heads": width // head_dim, "attention_head_dim": head_dim}
    odd = [f"{key}={given[key]} but {value}" for key, value in config.items() if given.get(key, value) != value]
    if odd:
        raise ValueError(f"'{path}': config.json says {', '.join(odd)} by the shapes: it belongs to another model.")
    return dict(given) | config


def _on_meta(model_class: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> Any:
    with torch.device("meta"):
        return model_class(*args, **kwargs)


def _shapes_of(model: nn.Module) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _check_shapes(found: Mapping[str, Shape], expected: Mapping[str, Shape], *, path: object) -> None:
    faults = shape_faults(found, expected)
    if faults:
        raise ValueError(f"'{path}' does not fit its model: {faults}. Nothing was written.")


def _outputs(
    checkpoint: Checkpoint,
    entry: str,
    sources: Mapping[str, str],
    *,
    dtype: torch.dtype | None = None,
    adapter: Adapter | None = None,
) -> list[OutputTensor]:
    """Tensors to write under new names, in their order; ``sources`` has the stored ones."""

    def load(name: str) -> Tensor:
        weight = checkpoint.read(entry, sources[name])
        return weight if adapter is None else adapter.merge(name, weight)

    stored = checkpoint.entries[entry]
    infos = {name: stored[source] for name, source in sources.items()}
    return [
        OutputTensor(name=name, info=TensorInfo(info.shape, dtype or info.dtype), load=partial(load, name))
        for name, info in infos.items()
    ]


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """A complete transformer in a checkpoint."""

    checkpoint: Checkpoint  # file of its weights
    entry: str  # of the file
    identity: Identity  # kind, naming and prefixes of the entry
    config: Mapping[str, Any]  # arguments of the WanTransformer3DModel that loads it
    sources: Mapping[str, str]  # diffusers name to name in the checkpoint, in the class's order

    @property
    def infos(self) -> dict[str, TensorInfo]:
        found = self.checkpoint.entries[self.entry]
        return {name: found[source] for name, source in self.sources.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.infos.items()}

    @property
    def width(self) -> int:
        return self.config["num_attention_heads"] * self.config["attention_head_dim"]

    @property
    def size(self) -> str | None:
        """``1.3B``, ``14B``, or None for any other."""
        return _SIZES.get((self.width, self.config["ffn_dim"], self.config["num_layers"]))

    @property
    def is_image_to_video(self) -> bool:
        return self.config.get("added_kv_proj_dim") is not None

    def part(self, *, dtype: torch.dtype | None = None, adapter: Adapter | None = None) -> Part:
        """Describe the folder to write: weights of ``dtype`` (as stored when None) with an adapter merged."""
        return Part(
            name="transformer",
            source=_title(self.checkpoint, self.entry),
            config=_stock_config(_on_meta(WanTransformer3DModel, **self.config)),
            tensors=_outputs(self.checkpoint, self.entry, self.sources, dtype=dtype, adapter=adapter),
        )


def find_transformer(checkpoint: Checkpoint, *, key: str | None = None, config: Path | None = None) -> Transformer:
    """Find the transformer of a checkpoint and check it against diffusers' class.

    Args:
        checkpoint: Opened.
        key: Entry; averaged weights first when None.
        config: A ``config.json`` that says how many heads there are; the one beside the checkpoint when None, and
            heads of 128 without any.

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
    beside = checkpoint.files[0].parent / "config.json"
    if config is None and beside.is_file() and read_json(beside).get("_class_name") in _CLASSES:
        config = beside
    arguments = _transformer_config(shapes, _read_config(config) if config else {}, path=path)
    expected = _shapes_of(_on_meta(WanTransformer3DModel, **arguments))
    _check_shapes(shapes, expected, path=path)
    ordered = {name: sources[name] for name in expected}
    return Transformer(checkpoint=checkpoint, entry=entry, identity=identity, config=arguments, sources=ordered)


def _title(checkpoint: Checkpoint, entry: str) -> str:
    return f"{checkpoint.path}:{entry}" if entry else str(checkpoint.path)


def _stock_config(model: Any) -> dict[str, Any]:
    """The ``config.json`` of a diffusers model: all arguments of its class, defaults included."""
    arguments = {name: value for name, value in sorted(model.config.items()) if not name.startswith("_")}
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}
    return {"_class_name": type(model).__name__, "_diffusers_version": diffusers.__version__} | listed


@dataclass(frozen=True, kw_only=True)
class _Target:
    shapes: Mapping[str, Shape]  # of its weights, in the class's order
    config: Mapping[str, Any]  # content of its config.json
    names: Mapping[str, str]  # new name to original name


_NUM_LATENT_CHANNELS = 16  # what the latents' published mean and deviation are for


def _original_vae(shapes: Mapping[str, Shape], path: object) -> _Target:
    """The ``AutoencoderKLWan`` that has these weights: Wan2.1's, of any width, with the class's own statistics."""
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
    model = _on_meta(AutoencoderKLWan, base_dim=base, z_dim=num_channels)
    # A name in the place of its tensor shows where diffusers' own conversion puts it.
    names = convert_wan_vae_to_diffusers({name: name for name in shapes})
    return _Target(shapes=_shapes_of(model), config=_stock_config(model), names=names)


_TEXT_OUTSIDE = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}
# Below `blocks.<index>.`; the gate is the factor with the activation, wi_0.
_TEXT_BLOCK = {
    "norm1.weight": "layer.0.layer_norm.weight",
    **{f"attn.{x}.weight": f"layer.0.SelfAttention.{x}.weight" for x in "qkvo"},
    "pos_embedding.embedding.weight": "layer.0.SelfAttention.relative_attention_bias.weight",
    "norm2.weight": "layer.1.layer_norm.weight",
    "ffn.gate.0.weight": "layer.1.DenseReluDense.wi_0.weight",
    "ffn.fc1.weight": "layer.1.DenseReluDense.wi_1.weight",
    "ffn.fc2.weight": "layer.1.DenseReluDense.wo.weight",
}
_TEXT_BLOCK_NAME = re.compile(r"blocks\.(\d+)\.(.+)")
_TIED = "encoder.embed_tokens.weight"  # the same numbers as shared.weight, stored once


def _text_encoder_name(name: str) -> str:
    """Translate a name of Wan's own text encoder; an unknown one stays."""
    match = _TEXT_BLOCK_NAME.fullmatch(name)
    if match is not None and match[2] in _TEXT_BLOCK:
        return f"encoder.block.{match[1]}.{_TEXT_BLOCK[match[2]]}"
    return _TEXT_OUTSIDE.get(name, name)


def _original_text_encoder(shapes: Mapping[str, Shape], path: object) -> _Target:
    """The ``UMT5EncoderModel`` that has these weights."""
    try:
        vocab_size, d_model = shapes["token_embedding.weight"]
        num_buckets, num_heads = shapes["blocks.0.pos_embedding.embedding.weight"]
        d_inner, d_ff = shapes["blocks.0.attn.q.weight"][0], shapes["blocks.0.ffn.fc1.weight"][0]
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"'{path}' is no complete UMT5 text encoder: {error}.") from error
    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=d_model,
        d_kv=d_inner // num_heads,
        d_ff=d_ff,
        num_layers=len({match[1] for match in map(_TEXT_BLOCK_NAME.fullmatch, shapes) if match}),
        num_heads=num_heads,
        relative_attention_num_buckets=num_buckets,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        architectures=["UMT5EncoderModel"],
    )
    expected = _shapes_of(_on_meta(UMT5EncoderModel, config))
    del expected[_TIED]
    names = {_text_encoder_name(name): name for name in shapes}
    return _Target(shapes=expected, config=config.to_dict(), names=names)


@dataclass(frozen=True, kw_only=True)
class _Kind:
    title: str  # for messages
    model: Callable[[Mapping[str, Shape], object], _Target]  # finds the model of original weights
    theirs: str  # name of a weight file of the folder form, for messages
    takes: str  # forms that its option takes, for messages
    key: str  # entry of config.json that tells the model
    value: str  # of this entry
    stem: str  # of the weight files to write


_KINDS = {
    "vae": _Kind(
        title="Wan VAE",
        model=_original_vae,
        theirs="a VAE in diffusers naming",
        takes="--vae takes Wan2.1_VAE.pth or a diffusers folder",
        key="_class_name",
        value="AutoencoderKLWan",
        stem="diffusion_pytorch_model",
    ),
    "text_encoder": _Kind(
        title="UMT5 text encoder",
        model=_original_text_encoder,
        theirs="a text encoder in transformers naming",
        takes="--text-encoder takes models_t5_umt5-xxl-enc-bf16.pth or a transformers folder",
        key="model_type",
        value="umt5",
        stem="model",
    ),
}


def find_part(name: str, path: Path) -> Part:
    """Take a VAE, text encoder or tokenizer: a released model's folder as it is, or Wan's own file converted.

    Args:
        name: ``vae``, ``text_encoder`` or ``tokenizer``.
        path: Its folder, the folder of a whole pipeline, or (but for the tokenizer) Wan's file.
    """
    words = name.replace("_", " ")
    if not path.is_dir():
        if name == "tokenizer":
            raise ValueError(f"'{path}' is no folder; --tokenizer takes one.")
        return _converted_part(name, open_checkpoint(path))
    folder = path / name if (path / "model_index.json").is_file() else path
    if name == "tokenizer":
        files, config = _tokenizer_files(folder), {}
    else:
        files, config = _model_files(folder, _KINDS[name])
    return Part(name=name, files=files, config=config, notes=[(words, f"taken from {folder}")])


def _tokenizer_files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.glob("*") if file.suffix in (".json", ".model") and file.is_file())
    if not {"tokenizer.json", "spiece.model"} & {file.name for file in files}:
        raise ValueError(f"'{folder}' holds no tokenizer: tokenizer.json or spiece.model is needed.")
    return files


def _model_files(folder: Path, kind: _Kind) -> tuple[list[Path], dict[str, Any]]:
    """Files of a model's folder, and the content of its ``config.json``."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"'{folder}' has no config.json: it is no diffusers or transformers folder.")
    config = read_json(folder / "config.json")
    if config.get(kind.key) != kind.value:
        raise ValueError(f"'{folder}' is no {kind.title}: its config.json says {config.get(kind.key)!r}.")
    shards = open_shards(folder)  # refuses what is truncated or lacks shards
    if shards is None:
        raise ValueError(f"'{folder}' holds no .safetensors weights; pickles are not taken as they are.")
    return [*sorted(folder.glob("*.json")), *shards.files], config


def _converted_part(name: str, checkpoint: Checkpoint) -> Part:
    """The part that Wan's own file becomes, complete, every shape checked against the class that will load it."""
    kind, path, entry = _KINDS[name], checkpoint.path, choose_entry(checkpoint)
    tensors = checkpoint.entries[entry]
    stored: dict[str, str] = {}
    for full in tensors:
        other = stored.setdefault(strip_wrappers(full), full)
        if other != full:
            raise ValueError(f"'{path}' holds {other} and {full}, which are one without wrappers: keep one set.")
    found = identify(tensors)
    if (found.kind, found.naming) != (name, "original"):
        title = f"{kind.theirs}: give its folder, with config.json" if found.kind == name else found.title
        raise ValueError(f"'{path}' is {title}; {kind.takes}.")
    infos = {original: tensors[source] for original, source in stored.items()}
    require_floats(path, infos)
    shapes = {original: info.shape for original, info in infos.items()}
    model = kind.model(shapes, path)
    lost = stored.keys() - set(model.names.values())
    if lost:
        raise ValueError(f"'{path}' holds some weights under two names: {listing(lost)}; keep one set.")
    _check_shapes({new: shapes[original] for new, original in model.names.items()}, model.shapes, path=path)
    outputs = _outputs(checkpoint, entry, {new: stored[model.names[new]] for new in model.shapes})
    dtype = {} if name == "vae" else {"dtype": str(outputs[0].info.dtype).removeprefix("torch.")}
    return Part(
        name=name,
        source=str(path),
        config={**model.config, **dtype},
        tensors=outputs,
        stem=kind.stem,
        notes=[(name.replace("_", " "), f"converted from {path.name}, {len(outputs)} tensors")],
    )
