"""What a label of an evaluation stands for: a cache policy and, where the entry names one, sparse attention."""

from collections.abc import Mapping
from typing import Any

from longtake.configs.loader import load_run

ATTENTION = "attention"
"""Key of an entry of ``caches`` beside the cache policy's own."""
DENSE = "dense"


def split_entry(entry: Any) -> tuple[Any, Any]:
    """An entry's cache policy, and its attention policy: both as ``longtake generate`` takes them."""
    if not isinstance(entry, Mapping):
        return entry, DENSE
    return {key: value for key, value in entry.items() if key != ATTENTION}, entry.get(ATTENTION) or DENSE


def resolve_entry(label: str, entry: Any, *, frames_per_block: int) -> dict[str, Any]:
    """Put an entry's settings over its presets, and refuse what cannot run.

    Args:
        label: Of the run, for errors.
        entry: Cache policy's name or mapping; the mapping may have the key ``attention`` with a name or a mapping.
        frames_per_block: Latent frames of the largest block.

    Returns:
        The cache policy's settings, and under ``attention`` the attention policy's. An entry that is dense has no such
        key, so that its hash is that of an entry that never named one.

    Raises:
        ValueError: If a name or a value is unknown, or the policies do not fit the model or each other.
    """
    from longtake.pipelines.settings import RolloutSettings

    cache, attention = split_entry(entry)
    run = load_run(options={"cache": cache, ATTENTION: attention, "prompt": "any"})
    try:
        settings = RolloutSettings(cache=run.cache, attention=run.attention)
        settings.policy.check(frames_per_block)
        settings.check_backend()
    except ValueError as error:
        raise ValueError(f"cache {label!r}: {error}") from error
    return dict(run.cache) if settings.sparsity.is_dense else {**run.cache, ATTENTION: dict(run.attention)}


def is_sparse(entry: Any) -> bool:
    """Whether a resolved entry leaves any of attention out."""
    return isinstance(entry, Mapping) and ATTENTION in entry
