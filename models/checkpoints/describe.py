"""What a checkpoint is, in rows of text: from headers and pickled structure, never from weights."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from longtake.configs.families import family_names, load_family
from longtake.models.checkpoints.checkpoint import FLAT, Checkpoint, TensorInfo, choose_entry, entry_title
from longtake.models.checkpoints.converting import Conversion
from longtake.models.checkpoints.identify import Identity, identify
from longtake.models.checkpoints.lora import LORA_ORDER, adapter_rank
from longtake.models.checkpoints.opening import open_checkpoint
from longtake.models.checkpoints.transformer import Transformer, find_transformer

Rows = list[tuple[str, str]]


def describe_checkpoint(path: Path, *, config: Path | None = None) -> Rows:
    """Say what a file is.

    Args:
        path: Anything that ``open_checkpoint`` takes.
        config: A ``config.json`` that says the number of heads, where none lies beside the file.

    Returns:
        (what, text) rows: container, entries, what they are, the model's size and shape, presets it may belong to.

    Raises:
        ValueError: If it cannot be opened; says what it is instead.
    """
    checkpoint = open_checkpoint(path)
    rows = [
        ("file", f"{path}, {checkpoint.num_bytes / 1e6:,.1f} MB"),
        ("container", f"{checkpoint.container}, {_count(len(checkpoint.entries), 'entry', 'entries')}"),
    ]
    identities = {entry: identify(tensors) for entry, tensors in checkpoint.entries.items()}
    for entry, tensors in checkpoint.entries.items():
        rows.append((entry_title(entry), _entry_text(tensors, identities[entry])))
    if checkpoint.others:
        rows.append(("beside them", ", ".join(checkpoint.others)))
    return rows + _model_rows(checkpoint, identities, config)


def summarise(conversion: Conversion) -> Rows:
    """Say what a conversion does.

    Returns:
        (what, text) rows.
    """
    found, adapter, request = conversion.transformer, conversion.adapter, conversion.request
    stored = dtypes_of(found.infos.values())
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


def dtypes_of(infos: Iterable[TensorInfo]) -> str:
    """Name the dtypes in use."""
    return ", ".join(sorted({str(info.dtype).removeprefix("torch.") for info in infos}))


def _entry_text(tensors: Mapping[str, TensorInfo], identity: Identity) -> str:
    text = f"{_weights_text(tensors)}, {dtypes_of(tensors.values())}: {identity.title}"
    if identity.kind == "lora":
        text += f", rank {', '.join(map(str, adapter_rank(tensors)))}"
    text += f", {identity.naming} naming" if identity.naming else ""
    return text + (f", prefixes {', '.join(identity.wrappers)}" if identity.wrappers else "")


def _model_rows(checkpoint: Checkpoint, identities: Mapping[str, Identity], config: Path | None) -> Rows:
    kinds = {identity.kind for identity in identities.values()}
    if "transformer" not in kinds:
        order = LORA_ORDER if "lora" in kinds else tuple(checkpoint.entries)
        title = identities[choose_entry(checkpoint, order=(*order, *checkpoint.entries))].title
        presets = _adapter_presets(checkpoint) if "lora" in kinds else []
        return [("taken as", title), *_preset_rows(presets)]
    try:
        found = find_transformer(checkpoint, config=config)
    except ValueError as error:
        return [("cannot be converted", str(error))]
    rows = [("taken unasked", entry_title(found.entry)), ("model", _shape_text(found))]
    return rows + _preset_rows(_presets(found))


def _preset_rows(names: Sequence[str]) -> Rows:
    return [("may belong to", ", ".join(names))] if names else []


def _presets(found: Transformer) -> list[str]:
    """Presets of the model's size whose entry is there; those whose file has the same name first."""
    fitting = []
    for name in family_names():
        family = load_family(name)
        has_entry = (family.checkpoint.key or FLAT) in found.checkpoint.entries
        if has_entry and family.size is not None and family.size == found.size:
            fitting.append((_file_name(family.checkpoint.file) != found.checkpoint.path.name, name))
    return [name for _, name in sorted(fitting)]


def _adapter_presets(checkpoint: Checkpoint) -> list[str]:
    return [
        name for name in family_names() if _file_name(load_family(name).checkpoint.lora_file) == checkpoint.path.name
    ]


def _file_name(path: str | None) -> str:
    return "" if path is None else Path(path).name


def _shape_text(found: Transformer) -> str:
    config = found.config
    task = "image-to-video" if found.is_image_to_video else "text-to-video"
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return (
        f"{found.size or 'own size'}, {task}: {config['num_layers']} layers, {width} wide, "
        f"{config['num_attention_heads']} heads of {config['attention_head_dim']}, feed-forward {config['ffn_dim']}, "
        f"channels {config['in_channels']} in, {config['out_channels']} out, text {config['text_dim']}"
    )


def _weights_text(tensors: Mapping[str, TensorInfo]) -> str:
    return f"{len(tensors)} tensors, {sum(info.num_elements for info in tensors.values()):,} numbers"


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
