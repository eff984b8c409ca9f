"""From a checkpoint file to a diffusers folder: first everything is checked, then everything is written."""

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from longtake.configs.families import ModelFamily, family_names, load_family
from longtake.models.checkpoints.files import (
    FLAT,
    Checkpoint,
    TensorInfo,
    choose_entry,
    entry_title,
    open_checkpoint,
)
from longtake.models.checkpoints.identify import Identity, identify
from longtake.models.checkpoints.lora import LORA_ORDER, Adapter, adapter_rank, read_adapter
from longtake.models.checkpoints.parts import DEFAULT_SHARD_BYTES, OnTensor, Part, write_json
from longtake.models.checkpoints.wan_parts import Transformer, find_part, find_transformer

DTYPES = ("float32", "bfloat16", "float16")
_FLOW_SHIFT = 5.0  # Wan2.1's own, and that of nearly all models trained from it
_INDEX = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


@dataclass(frozen=True, kw_only=True)
class ConversionRequest:
    """Source and settings of a conversion."""

    source: Path  # checkpoint file, index, or folder
    preset: str | None = None  # model family it is to fit
    key: str | None = None  # entry; the preset's, else averaged weights first, when None
    lora: Path | None = None  # adapter to merge
    lora_key: str | None = None  # entry of the adapter's file
    lora_alpha: float | None = None  # scale times rank of the adapter; the preset's when None
    config: Path | None = None  # a config.json that says the number of heads
    dtype: str | None = None  # one of DTYPES, for the transformer; as stored when None
    max_shard_bytes: int = DEFAULT_SHARD_BYTES  # limit of a weight file
    vae: Path | None = None  # folder, or Wan's own file
    text_encoder: Path | None = None  # folder, or Wan's own file
    tokenizer: Path | None = None  # folder


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A conversion of which everything but the numbers has been checked.

    ``parts`` are the transformer alone, or those of a whole pipeline's folder.
    """

    request: ConversionRequest
    transformer: Transformer
    adapter: Adapter | None
    parts: tuple[Part, ...]
    family: ModelFamily | None

    @property
    def is_pipeline(self) -> bool:
        return len(self.parts) > 1

    @property
    def num_tensors(self) -> int:
        return sum(len(part.tensors) for part in self.parts)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.info.num_bytes for part in self.parts for tensor in part.tensors)

    def write(self, out: Path, *, on_tensor: OnTensor | None = None) -> None:
        """Write the folder under a temporary name and rename it when it is whole.

        Raises:
            ValueError: If it exists, the disk is too small, or numbers are not finite; nothing is left then.
        """
        check_output(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if free < self.num_bytes:
            raise ValueError(f"'{out.parent}' has {free / 1e9:.1f} GB free, {self.num_bytes / 1e9:.1f} GB are needed.")
        partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
        partial.mkdir()
        try:
            self._write(partial, on_tensor)
            check_output(out)
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def record(self) -> dict[str, Any]:
        """Content of ``conversion.json``: origin of the weights, and their changes."""
        found, adapter = self.transformer, self.adapter
        record = {
            "source": found.checkpoint.path.name,
            "container": found.checkpoint.container,
            "entry": found.entry or None,
            "naming": found.identity.naming,
            "wrappers": list(found.identity.wrappers),
            "size": found.size,
            "preset": self.request.preset,
            "dtype": self.request.dtype,
            "num_tensors": len(found.sources),
        }
        if adapter is not None:
            record["lora"] = {
                "source": adapter.checkpoint.path.name,
                "entry": adapter.entry or None,
                "num_pairs": len(adapter.pairs),
                "ranks": adapter.ranks,
                "scales": adapter.scales,
            }
        return record

    def _write(self, folder: Path, on_tensor: OnTensor | None) -> None:
        limit = self.request.max_shard_bytes
        if not self.is_pipeline:
            self.parts[0].write(folder, max_shard_bytes=limit, on_tensor=on_tensor)
        else:
            for part in self.parts:
                (folder / part.name).mkdir()
                part.write(folder / part.name, max_shard_bytes=limit, on_tensor=on_tensor)
            self._scheduler().save_pretrained(folder / "scheduler")
            head = {"_class_name": "WanPipeline", "_diffusers_version": diffusers.__version__}
            write_json(
                folder / "model_index.json", head | {"boundary_ratio": None, "expand_timesteps": False} | _INDEX
            )
        write_json(folder / "conversion.json", self.record())

    def _scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        if self.family is None:
            return FlowMatchEulerDiscreteScheduler(shift=_FLOW_SHIFT)
        is_few_step = self.family.sampler["name"] != "multi_step"
        shift = self.family.sampler.get("flow_shift", _FLOW_SHIFT)
        return FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=is_few_step)


def check_output(out: Path) -> None:
    """Refuse a path that is there already."""
    if out.exists() or out.is_symlink():
        raise ValueError(f"'{out}' exists already; nothing is overwritten: give another folder (--out).")


def plan_conversion(request: ConversionRequest) -> Conversion:
    """Check a conversion by headers alone: names, shapes, dtypes, adapter, preset, and that the parts fit.

    Raises:
        ValueError: Says what does not fit.
    """
    family = load_family(request.preset) if request.preset is not None else None
    if request.dtype not in (None, *DTYPES):
        raise ValueError(
            f"dtype={request.dtype!r} is not written: use {', '.join(DTYPES)}, or none to keep the file's."
        )
    if request.lora is None and (request.lora_alpha is not None or request.lora_key is not None):
        raise ValueError("lora_alpha or lora_key is given without an adapter: give its file too (--lora).")
    checkpoint = open_checkpoint(request.source)
    key = request.key or _preset_key(checkpoint, family.checkpoint.key if family else None)
    transformer = find_transformer(checkpoint, key=key, config=request.config)
    if family is not None and family.size is not None and transformer.size != family.size:
        found = transformer.size or f"{transformer.width} wide with {transformer.config['num_layers']} layers"
        raise ValueError(
            f"'{transformer.checkpoint.path}' does not fit the preset {request.preset!r}: it is {found}, the preset "
            f"is for {family.size}. longtake info FILE names presets that fit."
        )
    adapter = _find_adapter(request, transformer, family)
    dtype = getattr(torch, request.dtype) if request.dtype else None
    parts = [transformer.part(dtype=dtype, adapter=adapter), *_other_parts(request, transformer)]
    return Conversion(request=request, transformer=transformer, adapter=adapter, parts=tuple(parts), family=family)


def _preset_key(checkpoint: Checkpoint, key: str | None) -> str | None:
    """A preset chooses between entries; tensors at the top leave nothing to choose."""
    return None if set(checkpoint.entries) == {FLAT} else key


def _find_adapter(request: ConversionRequest, transformer: Transformer, family: ModelFamily | None) -> Adapter | None:
    if request.lora is None:
        return None
    checkpoint = open_checkpoint(request.lora)
    key, alpha = request.lora_key, request.lora_alpha
    if family is not None:
        key = key or _preset_key(checkpoint, family.checkpoint.lora_key)
        alpha = family.checkpoint.lora_alpha if alpha is None else alpha
    return read_adapter(checkpoint, transformer.shapes, key=key, alpha=alpha)


def _other_parts(request: ConversionRequest, transformer: Transformer) -> list[Part]:
    """VAE, text encoder and tokenizer: all three or none."""
    given = {"--vae": request.vae, "--text-encoder": request.text_encoder, "--tokenizer": request.tokenizer}
    missing = [option for option, path in given.items() if path is None]
    if len(missing) == len(given):
        return []
    if request.vae is None or request.text_encoder is None or request.tokenizer is None:
        raise ValueError(f"a pipeline folder needs {' and '.join(missing)} too: give all three, or none of them.")
    if transformer.is_image_to_video:
        raise ValueError(
            f"'{transformer.checkpoint.path}' is an image-to-video model, whose pipeline needs an image encoder too: "
            "convert the transformer alone and put it into a folder that has one."
        )
    vae, text_encoder = find_part("vae", request.vae), find_part("text_encoder", request.text_encoder)
    config = transformer.config
    pairs = (
        ("--vae", "latent channels", vae.config.get("z_dim"), config["in_channels"]),
        ("--text-encoder", "text channels", text_encoder.config.get("d_model"), config["text_dim"]),
    )
    for option, what, found, wanted in pairs:
        if found != wanted:
            raise ValueError(f"{option} has {found} {what}, the transformer takes {wanted}: they are of two models.")
    return [vae, text_encoder, find_part("tokenizer", request.tokenizer)]


_Rows = list[tuple[str, str]]


def describe_checkpoint(path: Path) -> _Rows:
    """Describe a file in (what, text) rows: container, entries, their kinds, the model's shape, fitting presets."""
    checkpoint = open_checkpoint(path)
    num_entries = len(checkpoint.entries)
    rows = [
        ("file", f"{path}, {checkpoint.num_bytes / 1e6:,.1f} MB"),
        ("container", f"{checkpoint.container}, {num_entries} {'entry' if num_entries == 1 else 'entries'}"),
    ]
    identities = {entry: identify(tensors) for entry, tensors in checkpoint.entries.items()}
    for entry, tensors in checkpoint.entries.items():
        rows.append((entry_title(entry), _entry_text(tensors, identities[entry])))
    if checkpoint.others:
        rows.append(("beside them", ", ".join(checkpoint.others)))
    return rows + _model_rows(checkpoint, identities)


def summarise(conversion: Conversion) -> _Rows:
    """Describe a conversion in (what, text) rows."""
    found, adapter, request = conversion.transformer, conversion.adapter, conversion.request
    stored = _dtypes_of(found.infos.values())
    rows = [
        ("source", f"{found.checkpoint.path} ({found.checkpoint.container})"),
        ("entry", entry_title(found.entry)),
        ("model", _shape_text(found)),
        ("weights", f"{_weights_text(found.infos)}, {found.identity.naming} naming"),
        ("prefixes removed", ", ".join(found.identity.wrappers) or "none"),
        ("dtype", stored if request.dtype is None else f"{request.dtype} (the file: {stored})"),
    ]
    if adapter is not None:
        ranks, scales = (", ".join(f"{value:g}" for value in values) for values in (adapter.ranks, adapter.scales))
        rows.append(("adapter", f"{len(adapter.pairs)} pairs merged, rank {ranks}, alpha / rank {scales}"))
    rows += [note for part in conversion.parts for note in part.notes]
    if conversion.family is not None:
        rows.append(("licence", conversion.family.licence or "not stated"))
    return rows


def _dtypes_of(infos: Iterable[TensorInfo]) -> str:
    return ", ".join(sorted({str(info.dtype).removeprefix("torch.") for info in infos}))


def _entry_text(tensors: Mapping[str, TensorInfo], identity: Identity) -> str:
    text = f"{_weights_text(tensors)}, {_dtypes_of(tensors.values())}: {identity.title}"
    if identity.kind == "lora":
        text += f", rank {', '.join(map(str, adapter_rank(tensors)))}"
    text += f", {identity.naming} naming" if identity.naming else ""
    return text + (f", prefixes {', '.join(identity.wrappers)}" if identity.wrappers else "")


def _model_rows(checkpoint: Checkpoint, identities: Mapping[str, Identity]) -> _Rows:
    kinds = {identity.kind for identity in identities.values()}
    if "transformer" not in kinds:
        order = LORA_ORDER if "lora" in kinds else tuple(checkpoint.entries)
        title = identities[choose_entry(checkpoint, order=(*order, *checkpoint.entries))].title
        presets = []
        if "lora" in kinds:
            files = {name: load_family(name).checkpoint.lora_file for name in family_names()}
            presets = [name for name, file in files.items() if Path(file or "").name == checkpoint.path.name]
        return [("taken as", title), *_preset_rows(presets)]
    try:
        found = find_transformer(checkpoint)
    except ValueError as error:
        return [("cannot be converted", str(error))]
    rows = [("taken unasked", entry_title(found.entry)), ("model", _shape_text(found))]
    return rows + _preset_rows(_presets(found))


def _preset_rows(names: Sequence[str]) -> _Rows:
    return [("may belong to", ", ".join(names))] if names else []


def _presets(found: Transformer) -> list[str]:
    """Presets of the model's size whose entry is there; those whose file has the same name first."""
    fitting = []
    for name in family_names():
        family = load_family(name)
        has_entry = (family.checkpoint.key or FLAT) in found.checkpoint.entries
        if has_entry and family.size is not None and family.size == found.size:
            fitting.append((Path(family.checkpoint.file or "").name != found.checkpoint.path.name, name))
    return [name for _, name in sorted(fitting)]


def _shape_text(found: Transformer) -> str:
    config = found.config
    task = "image-to-video" if found.is_image_to_video else "text-to-video"
    return (
        f"{found.size or 'own size'}, {task}: {config['num_layers']} layers, {found.width} wide, "
        f"{config['num_attention_heads']} heads of {config['attention_head_dim']}, feed-forward {config['ffn_dim']}, "
        f"channels {config['in_channels']} in, {config['out_channels']} out, text {config['text_dim']}"
    )


def _weights_text(tensors: Mapping[str, TensorInfo]) -> str:
    return f"{len(tensors)} tensors, {sum(info.num_elements for info in tensors.values()):,} numbers"
