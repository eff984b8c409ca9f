"""LoRA adapters: found by name, checked against the model, merged in float32.

Names: PEFT (``base_model.model.blocks.0.self_attn.q.lora_A.weight``, with or without an adapter's name), diffusers
(``transformer.blocks.0.attn1.to_q.lora_A.weight``) and kohya (``lora_unet_blocks_0_self_attn_q.lora_down.weight``).
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from longtake.models.checkpoints.files import FLAT, Checkpoint, TensorInfo, choose_entry
from longtake.models.checkpoints.identify import require_floats
from longtake.models.conversion import diffusers_name, listing, original_name, strip_wrappers

LORA_ORDER = ("generator_lora", "lora", FLAT)

_FACTOR = re.compile(r"(?P<target>.+)\.lora_(?P<side>A|B|down|up)(?:\.(?P<adapter>[^.]+))?\.weight")
_ALPHA = re.compile(r"(?P<target>.+)\.alpha")
_SIDES = {"A": "A", "down": "A", "B": "B", "up": "B"}
_HOLDERS = frozenset({"base_model", "model", "transformer", "diffusion_model", "generator", "net"})
_KOHYA = "lora_unet_"


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """The two factors of one weight's change: ``W += scale * B @ A``."""

    down: str  # name of A, (rank, in)
    up: str  # name of B, (out, rank)
    rank: int
    scale: float


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits a model."""

    checkpoint: Checkpoint  # file of its factors
    entry: str  # of the file
    pairs: Mapping[str, _Pair]  # diffusers name of the weight to its pair

    @property
    def ranks(self) -> list[int]:
        return sorted({pair.rank for pair in self.pairs.values()})

    @property
    def scales(self) -> list[float]:
        return sorted({pair.scale for pair in self.pairs.values()})

    def merge(self, name: str, weight: Tensor) -> Tensor:
        """Add the change of a diffusers name, in float32; a weight without one stays itself."""
        pair = self.pairs.get(name)
        if pair is None:
            return weight
        down = self.checkpoint.read(self.entry, pair.down).float()
        up = self.checkpoint.read(self.entry, pair.up).float()
        return (up @ down).mul_(pair.scale).add_(weight)


def read_adapter(
    checkpoint: Checkpoint,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    key: str | None = None,
    alpha: float | None = None,
) -> Adapter:
    """Find an adapter's pairs and check them against the model.

    Args:
        checkpoint: The adapter's file.
        shapes: Diffusers name to shape of the model it is for.
        key: Entry of the file; ``generator_lora``, ``lora`` or tensors at the top when None.
        alpha: Scale times rank. Few files say it (``.alpha`` tensors); then it may be left out.

    Source: LoRA, arXiv:2106.09685.
    """
    path = checkpoint.path
    entry = choose_entry(checkpoint, key, order=LORA_ORDER)
    tensors = checkpoint.entries[entry]
    factors, alphas, unknown = _sort(tensors, shapes)
    if unknown:
        raise ValueError(
            f"adapter '{path}' changes what the model has not, or has unknown names: {listing(unknown)} of "
            f"{len(tensors)}; known are lora_A and lora_B (or down and up) of a Wan transformer's layers."
        )
    twice = [target for target, sides in factors.items() for names in sides.values() if len(names) > 1]
    if twice:
        raise ValueError(f"adapter '{path}' has several factors for {listing(twice)}: give one adapter at a time.")
    alone = [next(iter(sides.values()))[0] for sides in factors.values() if len(sides) < 2]
    if alone:
        raise ValueError(f"adapter '{path}' has factors without their partner: {listing(alone)}.")
    if not factors:
        raise ValueError(f"adapter '{path}' holds no lora_A and lora_B factors in {entry or 'its tensors'}.")
    require_floats(path, tensors)
    known = {target: float(checkpoint.read(entry, name).float()) for target, name in alphas.items()}
    pairs = {}
    for target, sides in factors.items():
        (down,), (up,) = sides["A"], sides["B"]
        shape, a, b = shapes[target], tensors[down].shape, tensors[up].shape
        if len(shape) != 2 or len(a) != 2 or len(b) != 2 or (b[0], a[1]) != shape or a[0] != b[1] or not a[0]:
            raise ValueError(
                f"adapter '{path}' does not fit {target} of shape {list(shape)}: {down} is {list(a)}, {up} is "
                f"{list(b)}; (rank, in) and (out, rank) fit."
            )
        scale = _alpha(path, known.get(target), alpha) / a[0]
        pairs[target] = _Pair(down=down, up=up, rank=a[0], scale=scale)
    return Adapter(checkpoint, entry, pairs)


def adapter_rank(tensors: Mapping[str, TensorInfo]) -> list[int]:
    """Read the ranks of an adapter off its shapes, whatever model it is for."""
    matches = ((info, _FACTOR.fullmatch(strip_wrappers(name))) for name, info in tensors.items())
    return sorted({info.shape[0] for info, match in matches if match and _SIDES[match["side"]] == "A" and info.shape})


def _sort(
    tensors: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, dict[str, list[str]]], dict[str, str], list[str]]:
    """({target: {side: names}}, {target: name of its alpha}, names that are neither)."""
    kohya = {name.removesuffix(".weight").replace(".", "_"): name for name in shapes}
    kohya |= {(original_name(name) or "").removesuffix(".weight").replace(".", "_"): name for name in shapes}
    factors: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    alphas: dict[str, str] = {}
    unknown = []
    for name in tensors:
        match = _FACTOR.fullmatch(name) or _ALPHA.fullmatch(name)
        target = _target(match["target"], kohya) if match else None
        if match is None or target is None or target not in shapes:
            unknown.append(name)
        elif match.re is _ALPHA:
            alphas[target] = name
        else:
            factors[target][_SIDES[match["side"]]].append(name)
    return factors, alphas, unknown


def _target(name: str, kohya: Mapping[str, str]) -> str | None:
    if name.startswith(_KOHYA):
        return kohya.get(name.removeprefix(_KOHYA))
    parts = strip_wrappers(name).split(".")
    while parts and parts[0] in _HOLDERS:
        parts = parts[1:]
    return diffusers_name(".".join([*parts, "weight"]))


def _alpha(path: object, stored: float | None, given: float | None) -> float:
    if stored is not None and given is not None and stored != given:
        raise ValueError(
            f"adapter '{path}' says alpha={stored:g} itself, {given:g} was given: leave --lora-alpha out."
        )
    alpha = given if stored is None else stored
    if alpha is None:
        raise ValueError(
            f"adapter '{path}' does not say its alpha, nor does the preset: give it (--lora-alpha); published with "
            "the adapter, often equal to its rank."
        )
    return alpha
