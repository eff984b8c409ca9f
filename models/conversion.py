"""Original Wan checkpoints, and everything trained from them, in diffusers' naming."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import TypeVar

Weight = TypeVar("Weight")  # a tensor, or what stands for one

# Path components that wrappers insert, at any depth: DataParallel, torch.compile, activation checkpointing, FSDP.
_WRAPPERS = frozenset({"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
# Attribute under which training code holds the network; at most one, in front.
_HOLDERS = frozenset({"model", "net"})
_LISTED = 5  # names quoted in an error

_BOTH = ("weight", "bias")
# original module path -> (diffusers module path, parameters); an empty tuple marks a bare parameter.
_Rows = Mapping[str, tuple[str, tuple[str, ...]]]

_OUTSIDE = {
    "patch_embedding": ("patch_embedding", _BOTH),
    "text_embedding.0": ("condition_embedder.text_embedder.linear_1", _BOTH),
    "text_embedding.2": ("condition_embedder.text_embedder.linear_2", _BOTH),
    "time_embedding.0": ("condition_embedder.time_embedder.linear_1", _BOTH),
    "time_embedding.2": ("condition_embedder.time_embedder.linear_2", _BOTH),
    "time_projection.1": ("condition_embedder.time_proj", _BOTH),
    "head.head": ("proj_out", _BOTH),
    "head.modulation": ("scale_shift_table", ()),
}
_OUTSIDE_IMAGE = {
    "img_emb.proj.0": ("condition_embedder.image_embedder.norm1", _BOTH),
    "img_emb.proj.1": ("condition_embedder.image_embedder.ff.net.0.proj", _BOTH),
    "img_emb.proj.3": ("condition_embedder.image_embedder.ff.net.2", _BOTH),
    "img_emb.proj.4": ("condition_embedder.image_embedder.norm2", _BOTH),
}
# Present only in first-and-last-frame models.
_OUTSIDE_OPTIONAL = {"img_emb.emb_pos": ("condition_embedder.image_embedder.pos_embed", ())}


def _attention_rows(original: str, diffusers: str) -> _Rows:
    rows: dict[str, tuple[str, tuple[str, ...]]] = {f"{original}.{x}": (f"{diffusers}.to_{x}", _BOTH) for x in "qkv"}
    rows[f"{original}.o"] = (f"{diffusers}.to_out.0", _BOTH)
    return rows | {f"{original}.norm_{x}": (f"{diffusers}.norm_{x}", ("weight",)) for x in "qk"}


# Below `blocks.<index>.`; the affine norm before cross-attention is norm3 in the original and norm2 in diffusers.
_BLOCK = {
    "modulation": ("scale_shift_table", ()),
    **_attention_rows("self_attn", "attn1"),
    **_attention_rows("cross_attn", "attn2"),
    "norm3": ("norm2", _BOTH),
    "ffn.0": ("ffn.net.0.proj", _BOTH),
    "ffn.2": ("ffn.net.2", _BOTH),
}
_BLOCK_IMAGE = {
    "cross_attn.k_img": ("attn2.add_k_proj", _BOTH),
    "cross_attn.v_img": ("attn2.add_v_proj", _BOTH),
    "cross_attn.norm_k_img": ("attn2.norm_added_k", ("weight",)),
}
_BLOCK_NAME = re.compile(r"blocks\.(0|[1-9][0-9]*)\.(.+)")


def _expand(rows: _Rows) -> dict[str, str]:
    names = {}
    for original, (diffusers, parameters) in rows.items():
        if not parameters:
            names[original] = diffusers
        names |= {f"{original}.{parameter}": f"{diffusers}.{parameter}" for parameter in parameters}
    return names


def _with_identity(rows: Mapping[str, str]) -> dict[str, str]:
    """Add diffusers' own names, so that what is converted already passes through."""
    return {diffusers: diffusers for diffusers in rows.values()} | dict(rows)


_OUTSIDE_REQUIRED = frozenset(_expand(_OUTSIDE).values())
_OUTSIDE_IMAGE_REQUIRED = frozenset(_expand(_OUTSIDE_IMAGE).values())
_BLOCK_REQUIRED = frozenset(_expand(_BLOCK).values())
_BLOCK_IMAGE_REQUIRED = frozenset(_expand(_BLOCK_IMAGE).values())
_OUTSIDE_NAMES = _with_identity(_expand(_OUTSIDE | _OUTSIDE_IMAGE | _OUTSIDE_OPTIONAL))
_BLOCK_NAMES = _with_identity(_expand(_BLOCK | _BLOCK_IMAGE))
_OUTSIDE_ORIGINALS = {new: old for old, new in _expand(_OUTSIDE | _OUTSIDE_IMAGE | _OUTSIDE_OPTIONAL).items()}
_BLOCK_ORIGINALS = {new: old for old, new in _expand(_BLOCK | _BLOCK_IMAGE).items()}


def strip_wrappers(name: str) -> str:
    """Remove ``module.``, ``_orig_mod.``, ``_checkpoint_wrapped_module.`` and ``_fsdp_wrapped_module.`` wherever they
    stand in a parameter's name, and one leading ``model.`` or ``net.``.
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    return ".".join(parts[1:] if parts[0:1] and parts[0] in _HOLDERS else parts)


def wrappers_in(names: Iterable[str]) -> list[str]:
    """Components that ``strip_wrappers`` removes from these names, each once, in the order met."""
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        holder = next((part for part in parts if part not in _WRAPPERS), "")
        found |= dict.fromkeys([holder] if holder in _HOLDERS else [])
        found |= dict.fromkeys(part for part in parts if part in _WRAPPERS)
    return list(found)


def diffusers_name(name: str) -> str | None:
    """Translate a stripped name of either naming to diffusers', or None when it is no part of a Wan transformer."""
    return _translate(name, _OUTSIDE_NAMES, _BLOCK_NAMES)


def original_name(name: str) -> str | None:
    """Translate diffusers' name back to Wan's own, or return None when it is no part of a Wan transformer."""
    return _translate(name, _OUTSIDE_ORIGINALS, _BLOCK_ORIGINALS)


def _translate(name: str, outside: Mapping[str, str], inside: Mapping[str, str]) -> str | None:
    match = _BLOCK_NAME.fullmatch(name)
    if match is None:
        return outside.get(name)
    return f"blocks.{match[1]}.{inside[match[2]]}" if match[2] in inside else None


def listing(names: Iterable[str]) -> str:
    """Quote some names and count them all, for messages."""
    names = sorted(names)
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)} ({', '.join(names[:_LISTED])}{rest})"


def shape_faults(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> str:
    """List misshapen, missing and extra weights with their counts, for messages; empty if there are none."""
    missing, extra = expected.keys() - found.keys(), found.keys() - expected.keys()
    odd = []
    for name in sorted(expected.keys() & found.keys()):
        own, wanted = found[name], expected[name]
        if own != wanted:
            remark = " (transposed)" if len(own) > 1 and own == wanted[::-1] else ""
            odd.append(f"{name} is {list(own)}, should be {list(wanted)}{remark}")
    faults = [f"{len(odd)} misshapen: {'; '.join(odd[:3])}{'; ...' if len(odd) > 3 else ''}"] if odd else []
    faults += [f"{what}: {listing(names)}" for what, names in (("missing", missing), ("extra", extra)) if names]
    return "; ".join(faults)


def _missing_names(names: Iterable[str]) -> set[str]:
    """Diffusers names that a complete transformer with these names would have as well."""
    names = set(names)
    blocks: dict[int, set[str]] = defaultdict(set)
    for name in names:
        if match := _BLOCK_NAME.fullmatch(name):
            blocks[int(match[1])].add(match[2])
    has_image = not names.isdisjoint(_OUTSIDE_IMAGE_REQUIRED) or any(
        not inside.isdisjoint(_BLOCK_IMAGE_REQUIRED) for inside in blocks.values()
    )
    wanted, inside = set(_OUTSIDE_REQUIRED), _BLOCK_REQUIRED
    if has_image:
        wanted, inside = wanted | _OUTSIDE_IMAGE_REQUIRED, inside | _BLOCK_IMAGE_REQUIRED
    num_blocks = max(blocks, default=0) + 1
    wanted |= {f"blocks.{index}.{name}" for index in range(num_blocks) for name in inside}
    return wanted - names


def convert_original_state_dict(state_dict: Mapping[str, Weight]) -> dict[str, Weight]:
    """Rename an original Wan, Self-Forcing, CausVid... transformer to diffusers' ``WanTransformer3DModel``.

    Names lose their training wrappers first (``strip_wrappers``); names that are in diffusers' naming already pass
    through. Tensors are handed on as they are, neither copied nor cast, and the input is not changed.

    Args:
        state_dict: Parameter name to tensor; the transformer alone, not the whole training checkpoint. Text-to-video
            layout, or image-to-video with its extra rows.

    Returns:
        Diffusers name to tensor, in the input's order, complete: ``load_state_dict(..., strict=True)`` finds every
        name of a ``WanTransformer3DModel`` with as many layers.

    Raises:
        ValueError: If names are unknown, meet after stripping, or leave a layer incomplete.

    Source: Wan2.1 and diffusers ``WanTransformer3DModel`` parameter names.
    """
    nested = [name for name, value in state_dict.items() if isinstance(value, Mapping)]
    if nested:
        raise ValueError(
            f"state_dict holds dictionaries under {listing(nested)}, tensors expected: pass the transformer's own "
            "part, for example checkpoint['generator_ema'] or checkpoint['generator']."
        )
    targets = ((name, diffusers_name(strip_wrappers(name))) for name in state_dict)
    sources = {name: target for name, target in targets if target is not None}
    unknown = [name for name in state_dict if name not in sources]
    if unknown:
        raise ValueError(
            f"state_dict has unknown names: {listing(unknown)} of {len(state_dict)}; known are the transformer "
            "weights of Wan2.1 in the original or the diffusers naming: remove the others, or merge adapters first."
        )
    counts = Counter(sources.values())
    twice = [name for name, target in sources.items() if counts[target] > 1]
    if twice:
        raise ValueError(
            f"state_dict names meet after removing wrappers: {listing(twice)}; each weight may come once: pass "
            "either the raw or the wrapped set."
        )
    missing = _missing_names(sources.values())
    if missing:
        raise ValueError(
            f"state_dict is incomplete, missing in diffusers naming: {listing(missing)}; {len(sources)} were given: "
            "pass all weights of the transformer."
        )
    return {sources[name]: tensor for name, tensor in state_dict.items()}
