"""What to change so that a video fits into memory, in order of least harm."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from longtake.cache.wrappers import budget

if TYPE_CHECKING:
    from longtake.pipelines.memory_plan import MemoryPlan, PlanRequest

LEAST_SAVING = 0.01  # of the peak: less is not worth a line
SMALLEST_SIDE = 256  # pixels; below, no model here was trained


@dataclass(frozen=True)
class Remedy:
    """Something to change.

    Attributes:
        what: In a few words.
        write: The flags, or the line of Python where there is no flag.
        request: The plan's request, changed.
    """

    what: str
    write: str
    request: "PlanRequest"


def remedies(plan: "MemoryPlan", total: int) -> Iterator[tuple[Remedy, "MemoryPlan"]]:
    """What to change, each on top of those before, until the plan fits.

    What saves less than a hundredth is left out.

    Args:
        plan: What does not fit.
        total: Bytes there are.
    """
    from longtake.pipelines.memory_plan import plan_memory

    makers: tuple[Callable[[MemoryPlan, int], Remedy | None], ...] = (
        _free_text,
        _half_precision,
        _offload_model,
        lambda plan, total: _encode(plan, 8),
        lambda plan, total: _encode(plan, 4),
        _offload_cache,
        _tile,
        _shorten,
        _shrink,
    )
    for make in makers:
        if plan.peak <= total:
            return
        remedy = make(plan, total)
        if remedy is None:
            continue
        try:
            with _no_warnings():
                reached = plan_memory(remedy.request)
        except ValueError:  # a budget that nothing fits
            continue
        if plan.peak - reached.peak < LEAST_SAVING * plan.peak:
            continue
        plan = reached
        yield remedy, plan


@contextmanager
def _no_warnings() -> Iterator[None]:
    """A budget that is only tried has nothing to warn of."""
    logger = logging.getLogger(budget.__name__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _free_text(plan: "MemoryPlan", total: int) -> Remedy | None:
    if plan.request.text_encoder == "freed" or plan.request.offloads:
        return None
    return Remedy("free the text encoder", "--free-text-encoder", replace(plan.request, text_encoder="freed"))


def _half_precision(plan: "MemoryPlan", total: int) -> Remedy | None:
    import torch

    if plan.request.dtype != torch.float32:
        return None
    return Remedy("bfloat16", "model.dtype=bfloat16", replace(plan.request, dtype=torch.bfloat16))


def _offload_model(plan: "MemoryPlan", total: int) -> Remedy | None:
    if plan.request.device_type != "cuda" or plan.request.offloads:
        return None
    request = replace(plan.request, offloads=True)
    return Remedy("only the part at work on the GPU", "model.offload=model", request)


def _encode(plan: "MemoryPlan", bits: int) -> Remedy | None:
    from longtake.cache import make_policy

    settings = plan.request.policy.settings()
    if settings["policy"] == "quantized":
        settings = settings["inner"]
    if "inner" in settings:
        return None  # a wrapper of the user's own: what is in it is theirs to say
    policy = make_policy({"policy": "quantized", "inner": settings, "bits": bits})
    write = f"--cache quantized cache.bits={bits} {_flags(settings, 'cache.inner')}"
    return Remedy(f"keys and values in {bits} bits", write, replace(plan.request, policy=policy))


def _offload_cache(plan: "MemoryPlan", total: int) -> Remedy | None:
    from longtake.cache import make_policy

    settings = plan.request.policy.settings()
    if plan.request.device_type != "cuda" or settings["policy"] == "offloaded":
        return None
    policy = make_policy({"policy": "offloaded", "inner": settings})
    write = f"--cache offloaded {_flags(settings, 'cache.inner')}"
    return Remedy("keys and values in host memory", write, replace(plan.request, policy=policy))


def _tile(plan: "MemoryPlan", total: int) -> Remedy | None:
    # On the CPU the features of all tiles lie in the same memory, and are more than those of the whole frame.
    if plan.request.device_type != "cuda" or plan.request.tiles_vae:
        return None
    return Remedy("decode in tiles", "model.vae_tiling=true", replace(plan.request, tiles_vae=True))


def _shorten(plan: "MemoryPlan", total: int) -> Remedy | None:
    """A budget of what is left for one branch's cache, which shortens the window."""
    from longtake.cache import make_policy

    settings = plan.request.policy.settings()
    branches = plan.request.num_branches
    held = branches * (plan.cache_bytes.stored + plan.cache_bytes.read_sets)
    left = (total - plan.peak + held) // branches
    if left <= 0 or settings["policy"] == "budget":
        return None
    megabytes = left // 10**6
    policy = make_policy({"policy": "budget", "inner": settings, "max_bytes": f"{megabytes}MB", "min_bits": 4})
    flags = f"cache.max_bytes={megabytes}MB cache.min_bits=4 {_flags(settings, 'cache.inner')}"
    return Remedy("a shorter window", f"--cache budget {flags}", replace(plan.request, policy=policy))


def _shrink(plan: "MemoryPlan", total: int) -> Remedy | None:
    """The largest picture of the same shape that fits by proportion, all but weights taken to follow its area."""
    request = plan.request
    fixed = sum(plan.weights.values())
    scale = max(0.0, (total - fixed) / max(1, plan.peak - fixed)) ** 0.5 * 0.95
    height, width = (max(16, int(side * scale) // 16 * 16) for side in (request.height, request.width))
    if min(height, width) < min(SMALLEST_SIDE, request.height, request.width):
        return None
    return Remedy("a smaller picture", f"height={height} width={width}", replace(request, height=height, width=width))


def _flags(settings: Mapping[str, Any], prefix: str) -> str:
    """A policy's settings as dotted overrides: its name, and what differs from its preset."""
    from longtake.configs.loader import load_preset

    preset = load_preset("cache", settings["policy"])
    words = [f"{prefix}.policy={settings['policy']}"]
    for key, value in settings.items():
        if key == "inner":
            words.append(_flags(value, f"{prefix}.inner"))
        elif key != "policy" and (key not in preset or preset[key] != value) and value is not None:
            words.append(f"{prefix}.{key}={value}")
    return " ".join(words)
