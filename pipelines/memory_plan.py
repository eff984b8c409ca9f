"""How much memory a video takes, before anything of it is loaded.

Sizes of weights come from headers or shapes; those of the cache and of everything else from the real code, run on meta
tensors (``cache/allocation.py``, ``memory_trace.py``).
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from longtake.cache import CachePolicy, Geometry
from longtake.cache.allocation import CacheBytes, CachePlay, chosen_policy, play_cache
from longtake.pipelines.memory_trace import (
    DecodeBytes,
    ForwardBytes,
    trace_decode,
    trace_forward,
    trace_text,
    trace_tiled_decode,
)
from longtake.pipelines.model_shapes import ModelShapes
from longtake.pipelines.rollout import MERGE_LIMIT
from longtake.samplers import Sampler

# The interpreter with torch, diffusers and transformers: 0.45 GB measured on the CPU; on a GPU the driver's context.
PROGRAM_BYTES = 500_000_000
PART_OF_PHASE = {"text encoding": "text_encoder", "denoising": "transformer", "decoding": "vae"}


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What is to be planned.

    Attributes:
        shapes: Of the model.
        policy: Of the cache.
        sampler: Decides about guidance branches and windows.
        height: Pixels.
        width: Pixels.
        num_latent_frames: Of the whole video.
        frames_per_block: Latent frames denoised together.
        dtype: Of weights and activations.
        device_type: Where it runs.
        batch_size: Videos made together.
        num_text_tokens: Length that texts are padded to.
        merge_commit: As of ``LatentRollout``.
        text_encoder: Whether it stays loaded once the text is encoded; freed, a GPU never has it, for the text is
            encoded before the model is moved there.
        offloads: Whether only the part at work is on the device (``enable_model_cpu_offload``).
        tiles_vae: Whether the VAE decodes in tiles.
    """

    shapes: ModelShapes
    policy: CachePolicy
    sampler: Sampler
    height: int
    width: int
    num_latent_frames: int
    frames_per_block: int
    dtype: torch.dtype
    device_type: Literal["cpu", "cuda"]
    batch_size: int = 1
    num_text_tokens: int = 512
    merge_commit: bool | None = None
    text_encoder: Literal["kept", "freed"] = "kept"
    offloads: bool = False
    tiles_vae: bool = False

    @property
    def num_branches(self) -> int:
        """Guidance branches, each with a cache of its own."""
        return 1 if self.sampler.guidance_scale == 1.0 else 2

    @property
    def num_blocks(self) -> int:
        """Blocks of the video."""
        return -(-self.num_latent_frames // self.frames_per_block)

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of a latent frame."""
        config = self.shapes.configs["transformer"]
        factor = self.shapes.configs["vae"].get("scale_factor_spatial", 8)
        return config.get("in_channels", 16), self.height // factor, self.width // factor

    def geometry(self) -> Geometry:
        """Shapes of the rollout, on the meta device."""
        config = self.shapes.configs["transformer"]
        _, rows, columns = config.get("patch_size", (1, 2, 2))
        _, height, width = self.frame_shape
        return Geometry(
            num_layers=config["num_layers"],
            num_heads=config["num_attention_heads"],
            head_dim=config["attention_head_dim"],
            num_rows=height // rows,
            num_columns=width // columns,
            frames_per_block=self.frames_per_block,
            batch_size=self.batch_size,
            max_frames=self.num_blocks * self.frames_per_block,
            dtype=self.dtype,
            device=torch.device("meta"),
        )


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of everything that a video takes.

    Attributes:
        request: What was planned.
        policy: What the cache runs: what a budget chose, else the request's.
        weights: By part.
        cache: Of one guidance branch.
        forward: Text keys and values of one branch, and the largest moment of a forward.
        modulation: Shift, scale and gate of all layers for all timesteps of a block.
        decode: Of the VAE.
        text_activations: The largest moment of encoding a text.
    """

    request: PlanRequest
    policy: CachePolicy
    weights: Mapping[str, int]
    cache: CachePlay
    forward: ForwardBytes
    modulation: int
    decode: DecodeBytes
    text_activations: int

    @property
    def cache_bytes(self) -> CacheBytes:
        """The most of one branch's cache."""
        return self.cache.most

    @property
    def denoising_activations(self) -> int:
        """The largest moment of a forward, or of building larger read sets; where a policy pools pixels, with that."""
        largest = max(self.forward.activations, self.cache.assembling)
        pooling = self.decode.features + self.decode.activations if self.policy.needs_vae else 0
        return max(largest, pooling)

    @property
    def staging(self) -> int:
        """Of places in the host's memory: two layers' worth that are on the GPU at a time, of every branch."""
        if self.request.device_type != "cuda":
            return 0
        return 2 * self.request.num_branches * self.cache_bytes.on_host // self.request.geometry().num_layers

    @property
    def held(self) -> int:
        """What stays on the device from the first block to the last, weights not counted."""
        branch = self.cache_bytes.on_device + self.forward.text
        branch += self.cache_bytes.on_host if self.request.device_type == "cpu" else 0
        return self.request.num_branches * branch + self.staging + self.modulation + self.decode.features

    def weights_in(self, phase: str) -> int:
        """Bytes of the parts that are on the device in a phase."""
        request, active = self.request, PART_OF_PHASE[phase]
        if request.offloads:
            return self.weights[active]
        is_freed = request.text_encoder == "freed" and active != "text_encoder"
        return sum(size for part, size in self.weights.items() if not (is_freed and part == "text_encoder"))

    @property
    def phases(self) -> dict[str, int]:
        """Bytes on the device at the largest moment of each phase."""
        moments = {
            "text encoding": self.text_activations,
            "denoising": self.held + self.denoising_activations,
            "decoding": self.held + self.decode.activations,
        }
        if self.request.device_type == "cuda" and self.request.text_encoder == "freed":
            moments.pop("text encoding")
        return {phase: PROGRAM_BYTES + self.weights_in(phase) + moment for phase, moment in moments.items()}

    @property
    def peak(self) -> int:
        """Most bytes on the device."""
        return max(self.phases.values())

    @property
    def host_peak(self) -> int:
        """Most bytes in the host's memory: everything on the CPU; beside a GPU what is loaded, offloaded or far."""
        if self.request.device_type == "cpu":
            return self.peak
        on_host = self.request.num_branches * self.cache_bytes.on_host + self.decode.resting
        waiting = sum(self.weights.values()) if self.request.offloads else 0
        return PROGRAM_BYTES + max(sum(self.weights.values()), waiting + on_host)


def plan_memory(request: PlanRequest) -> MemoryPlan:
    """Add up what a video takes.

    Raises:
        ValueError: If the policy has no room for the blocks, or nothing fits its budget.
    """
    geometry, sampler = request.geometry(), request.sampler
    window = sampler.num_window_blocks
    request.policy.check(request.frames_per_block * window, geometry.max_frames)
    policy = chosen_policy(request.policy, geometry)
    channels, height, width = request.frame_shape
    shown = {"window_blocks": window, "latent_channels": channels}
    cache = play_cache(policy, geometry, num_blocks=request.num_blocks, **shown)
    tokens = geometry.tokens_per_frame * request.frames_per_block
    merges = 2 * tokens <= MERGE_LIMIT if request.merge_commit is None else request.merge_commit
    forward = trace_forward(
        request.shapes.configs["transformer"],
        policy,
        geometry,
        num_blocks=min(cache.num_blocks, request.num_blocks),
        device_type=request.device_type,
        num_text_tokens=request.num_text_tokens,
        merges_commit=merges,
        window_blocks=window,
    )
    latents = (request.batch_size, channels, request.frames_per_block, height, width)
    where = {"dtype": request.dtype, "device_type": request.device_type}
    decode = _tiled_decode if request.tiles_vae else _decode
    return MemoryPlan(
        request=request,
        policy=policy,
        weights=request.shapes.weight_bytes(request.dtype),
        cache=cache,
        forward=forward,
        modulation=_modulation_bytes(geometry, sampler.num_steps(0) + 1),
        decode=decode(_key(request.shapes.configs["vae"]), latents, **where),
        text_activations=_text(_key(request.shapes.configs["text_encoder"]), request.num_text_tokens, **where),
    )


def machine_memory(device_type: str) -> tuple[int, int]:
    """Total and available bytes of this machine's memory, or of its GPU's."""
    if device_type == "cuda":
        free, total = torch.cuda.mem_get_info()
        return total, free
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = (page * os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    # Linux knows better what is available: what caches of files give back is not free yet.
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text(encoding="ascii").splitlines() if meminfo.exists() else []
    known = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return total, known[0] if known else free


def _modulation_bytes(geometry: Geometry, num_timesteps: int) -> int:
    """Six float32 rows per layer and timestep (``models/modulated_block.py``)."""
    width = geometry.num_heads * geometry.head_dim
    return 6 * width * torch.float32.itemsize * geometry.num_layers * num_timesteps


def _key(config: Mapping[str, Any]) -> str:
    return json.dumps(dict(config), sort_keys=True)


@lru_cache(maxsize=8)
def _decode(config: str, latents: tuple[int, ...], *, dtype: torch.dtype, device_type: str) -> DecodeBytes:
    return trace_decode(json.loads(config), latents, dtype=dtype, device_type=device_type)


@lru_cache(maxsize=8)
def _tiled_decode(config: str, latents: tuple[int, ...], *, dtype: torch.dtype, device_type: str) -> DecodeBytes:
    return trace_tiled_decode(json.loads(config), latents, dtype=dtype, device_type=device_type)


@lru_cache(maxsize=8)
def _text(config: str, num_tokens: int, *, dtype: torch.dtype, device_type: str) -> int:
    return trace_text(json.loads(config), num_tokens=num_tokens, dtype=dtype, device_type=device_type)
