"""Memory that a video takes, in closed form, before anything of it is loaded.

Weights are counted in file headers, the cache by what its policy keeps and reads (``cache/footprint.py``), the rest
from the sizes of models and frames. The constants of activations were fitted to counts of live tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal, Self

import psutil
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from safetensors import SafetensorError, safe_open

from longtake.cache import CachePolicy, Geometry, make_policy
from longtake.cache.footprint import Footprint, footprint
from longtake.configs.families import PIXELS_PER_LATENT, ModelFamily, load_family
from longtake.configs.run import RunConfig
from longtake.models.streaming_vae import Tiling
from longtake.pipelines.loading import TRANSFORMERS, WEIGHTS, check_model_folder, read_config
from longtake.pipelines.rollout import MERGE_LIMIT
from longtake.samplers import Sampler, make_sampler

# The interpreter with torch, diffusers and transformers: 0.45 GB measured on the CPU; on a GPU the driver's context.
PROGRAM_BYTES = 500_000_000
_PART_OF_PHASE = {"text encoding": "text_encoder", "denoising": "transformer", "decoding": "vae"}

UMT5_XXL = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
# Numbers of all parameters, and of those that diffusers keeps in float32.
_PUBLISHED_NUMBERS = {
    "1.3B": (1_418_996_800, 3_127_296),
    "14B": (14_288_491_584, 29_184_000),
    "text_encoder": (5_680_910_336, 0),
    "vae": (126_892_531, 0),
}

# Largest moment of a forward, in tensors of its tokens and channels: of attention, of the feed-forward beside
# its two inner tensors, of a forward of several segments beside either, and while a layer gathers what it reads.
_ATTENTION = {2: 12.2, 4: 8.1}  # by bytes of a number
_FEED_FORWARD, _SEGMENTS, _GATHERING = 3.1, 1.0, 6.0
_TIMESTEP_ROWS = 8  # float32, of every frame
# Largest moment of decoding a latent frame, in tensors of its widest layer.
_DECODE = {("cuda", 2): 7.2, ("cuda", 4): 6.55, ("cpu", 2): 6.0, ("cpu", 4): 6.0}
_PIXEL_BYTES = {2: 10, 4: 12}  # of every colour while frames are made of what the VAE returns
_TEXT_BYTES = {2: 26, 4: 24}  # per token and channel of a text encoder's layer
_TILE, _TILE_STRIDE = 256, 192  # pixels: what ``enable_tiling`` sets


@dataclass(frozen=True)
class ModelShapes:
    """Sizes of a model's parts: transformer, text_encoder and vae."""

    configs: Mapping[str, Mapping[str, Any]]  # as their classes take them
    numbers: Mapping[str, tuple[int, int]]  # of all parameters, and of those that stay in float32
    source: str  # where that is from

    def weight_bytes(self, dtype: torch.dtype) -> dict[str, int]:
        """Bytes of every part when it is loaded in ``dtype``."""
        return {part: (n - kept) * dtype.itemsize + 4 * kept for part, (n, kept) in self.numbers.items()}


def _shapes_of(family: ModelFamily, folder: Path | None = None) -> ModelShapes:
    """Sizes of a folder's parts, or of the family's published ones where there is no folder."""
    if folder is not None:
        check_model_folder(folder)
        configs = {part: read_config(folder / part / "config.json") for part in WEIGHTS}
        return ModelShapes(configs, {part: _read_numbers(folder / part) for part in WEIGHTS}, str(folder))
    if family.size is None:
        raise ValueError(f"this model family says no size, and {' or '.join(TRANSFORMERS)} is needed: give a folder.")
    configs = {"transformer": TRANSFORMERS[family.size], "text_encoder": UMT5_XXL, "vae": {}}
    numbers = {part: _PUBLISHED_NUMBERS[family.size if part == "transformer" else part] for part in configs}
    return ModelShapes(configs, numbers, f"published shapes of Wan2.1 {family.size}")


def count_numbers(part: str, parameters: Mapping[str, int]) -> tuple[int, int]:
    """Numbers of all of a part's parameters, and of those that diffusers keeps in float32."""
    classes = {"transformer": WanTransformer3DModel, "vae": AutoencoderKLWan}
    kept = set(classes[part]._keep_in_fp32_modules or ()) if part in classes else set()
    tied = "encoder.embed_tokens.weight" if "shared.weight" in parameters else None  # the same memory
    numbers = {name: n for name, n in parameters.items() if name != tied}
    return sum(numbers.values()), sum(n for name, n in numbers.items() if kept & set(name.split(".")))


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """Settings of a video whose memory is planned."""

    shapes: ModelShapes
    policy: CachePolicy
    sampler: Sampler  # decides about guidance branches and windows
    height: int  # pixels
    width: int
    num_latent_frames: int  # of the whole video
    frames_per_block: int
    dtype: torch.dtype  # of weights and activations
    device_type: Literal["cpu", "cuda"]
    batch_size: int = 1
    num_text_tokens: int = 512  # length that texts are padded to
    merge_commit: bool | None = None  # as of ``LatentRollout``
    # Freed once the text is encoded, a GPU never has it: the text is encoded before the model is moved there.
    text_encoder: Literal["kept", "freed"] = "kept"
    offloads: bool = False  # only the part at work is on the device (``enable_model_cpu_offload``)
    tiles_vae: bool = False

    @classmethod
    def of_run(
        cls, run: RunConfig, *, folder: Path | None, device_type: Literal["cpu", "cuda"], batch_size: int = 1
    ) -> Self:
        """Request of a run's settings; of the family's published shapes where there is no folder."""
        family = load_family(run.model.family)
        num_pixel_frames = max(1, round(run.seconds * family.fps))
        return cls(
            shapes=_shapes_of(family, folder),
            policy=make_policy(run.cache),
            sampler=make_sampler(run.sampler),
            height=run.height or family.height,
            width=run.width or family.width,
            num_latent_frames=1 + -(-(num_pixel_frames - 1) // PIXELS_PER_LATENT),
            frames_per_block=max(family.frames_per_block, family.first_block_frames or 1),
            dtype=getattr(torch, run.model.dtype),
            device_type=device_type,
            batch_size=batch_size,
            num_text_tokens=family.max_sequence_length,
            text_encoder="freed" if run.model.free_text_encoder else "kept",
            offloads=run.model.offload != "none",
            tiles_vae=run.model.vae_tiling,
        )

    @property
    def num_branches(self) -> int:
        """Guidance branches, each with a cache of its own."""
        return 1 if self.sampler.guidance_scale == 1.0 else 2

    @property
    def num_blocks(self) -> int:
        return -(-self.num_latent_frames // self.frames_per_block)

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of a latent frame."""
        config = self.shapes.configs["transformer"]
        factor = self.shapes.configs["vae"].get("scale_factor_spatial", 8)
        return config.get("in_channels", 16), self.height // factor, self.width // factor

    def geometry(self) -> Geometry:
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
            device=torch.device(self.device_type),
        )


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of everything that a video takes."""

    request: PlanRequest
    policy: CachePolicy  # what a budget chose, else the request's
    weights: Mapping[str, int]  # by part
    cache: Footprint  # of one guidance branch
    text: int  # keys and values of cross-attention and the text they are made from, of one guidance branch
    modulation: int  # shift, scale and gate of all layers for all timesteps of a block
    features: int  # the VAE's past frames
    resting: int  # of the past frames of tiles, what waits in host memory beside a GPU
    forward: int  # the largest moment of a forward
    decoding: int  # the largest moment of decoding, the block's pixels included
    encoding: int  # the largest moment of encoding a text

    @property
    def denoising(self) -> int:
        """The largest moment of a block's forwards; where a policy pools pixels, of a decode beside them."""
        pooling = self.features + self.decoding if self.policy.traits.needs_vae else 0
        return max(self.forward, pooling)

    @property
    def staging(self) -> int:
        """Bytes on a GPU of places in host memory: what two layers read, of every branch."""
        if self.request.device_type != "cuda":
            return 0
        num_layers = self.request.geometry().num_layers
        return 2 * self.request.num_branches * min(self.cache.on_host // num_layers, self.cache.layer_reads)

    @property
    def held(self) -> int:
        """Bytes on the device from the first block to the last, weights not counted."""
        branch = self.cache.on_device + self.text
        branch += self.cache.on_host if self.request.device_type == "cpu" else 0
        return self.request.num_branches * branch + self.staging + self.modulation + self.features

    def weights_in(self, phase: str) -> int:
        request, active = self.request, _PART_OF_PHASE[phase]
        if request.offloads:
            return self.weights[active]
        is_freed = request.text_encoder == "freed" and active != "text_encoder"
        return sum(size for part, size in self.weights.items() if not (is_freed and part == "text_encoder"))

    @property
    def phases(self) -> dict[str, int]:
        moments = {
            "text encoding": self.encoding,
            "denoising": self.held + self.denoising,
            "decoding": self.held + self.decoding,
        }
        if self.request.device_type == "cuda" and self.request.text_encoder == "freed":
            moments.pop("text encoding")
        return {phase: PROGRAM_BYTES + self.weights_in(phase) + moment for phase, moment in moments.items()}

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def host_peak(self) -> int:
        """Most bytes in host memory: everything on the CPU; beside a GPU what is loaded, offloaded or resting."""
        if self.request.device_type == "cpu":
            return self.peak
        on_host = self.request.num_branches * self.cache.on_host + self.resting
        waiting = sum(self.weights.values()) if self.request.offloads else 0
        return PROGRAM_BYTES + max(sum(self.weights.values()), waiting + on_host)


def plan_memory(request: PlanRequest) -> MemoryPlan:
    """Add up what a video takes.

    Raises:
        ValueError: If the policy has no room for the blocks, or nothing fits its budget.
    """
    geometry, window = request.geometry(), request.sampler.num_window_blocks
    request.policy.check(request.frames_per_block * window, geometry.max_frames)
    policy = request.policy.chosen(geometry)
    cache = footprint(
        policy,
        geometry,
        num_blocks=request.num_blocks,
        window_blocks=window,
        latent_channels=request.frame_shape[0],
    )
    merges = policy.start(replace(geometry, device=torch.device("meta"))).merges_commit
    features, decoding, resting = _decode_bytes(request)
    width, itemsize = geometry.num_heads * geometry.head_dim, request.dtype.itemsize
    text_dim = request.shapes.configs["transformer"].get("text_dim", 4096)
    text_numbers = text_dim + width + 2 * width * geometry.num_layers
    num_timesteps = request.sampler.num_steps(0) + 1
    return MemoryPlan(
        request=request,
        policy=policy,
        weights=request.shapes.weight_bytes(request.dtype),
        cache=cache,
        text=request.batch_size * request.num_text_tokens * text_numbers * itemsize,
        # Six float32 rows per layer and timestep (``models/modulated_block.py``).
        modulation=6 * width * torch.float32.itemsize * geometry.num_layers * num_timesteps,
        features=features,
        resting=resting,
        forward=_forward_bytes(request, geometry, cache, merges=merges),
        decoding=decoding,
        encoding=_encoding_bytes(request),
    )


def device_kind(name: str) -> Literal["cpu", "cuda"]:
    """``cpu`` or ``cuda``, the latter also for planning where there is none."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    for kind in ("cpu", "cuda"):
        if name.split(":")[0] == kind:
            return kind
    raise ValueError(f"--device {name!r} cannot be planned for: use auto, cpu or cuda")


def format_bytes(size: float) -> str:
    """A size as people write it."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def machine_memory(device_type: str) -> tuple[int, int]:
    """Total and available bytes of this machine's memory, or of its GPU's."""
    if device_type == "cuda":
        free, total = torch.cuda.mem_get_info()
        return total, free
    memory = psutil.virtual_memory()
    return memory.total, memory.available


def _forward_bytes(request: PlanRequest, geometry: Geometry, cache: Footprint, *, merges: bool) -> int:
    """The largest moment of a forward of the transformer."""
    width, itemsize = geometry.num_heads * geometry.head_dim, request.dtype.itemsize
    num_tokens, window = geometry.tokens_per_frame * request.frames_per_block, request.sampler.num_window_blocks
    wants = 2 * num_tokens <= MERGE_LIMIT if request.merge_commit is None else request.merge_commit
    merges = merges and wants and window == 1
    num_blocks = 2 if merges else window
    block = request.batch_size * num_tokens * width * itemsize
    ratio = request.shapes.configs["transformer"]["ffn_dim"] / width
    is_fused = request.device_type == "cpu" and itemsize < 4  # the feed-forward, a few tokens at a time
    largest = max(_ATTENTION[itemsize], 0 if is_fused else _FEED_FORWARD + 2 * ratio) + (num_blocks > 1) * _SEGMENTS
    rows = _TIMESTEP_ROWS * request.batch_size * request.frames_per_block * num_blocks * width * 4
    return max(int(largest * num_blocks * block) + rows, int(_GATHERING * block) + cache.gathering)


def _decode_bytes(request: PlanRequest) -> tuple[int, int, int]:
    """Past frames, the largest moment of a block, and of tiles what rests in host memory."""
    _, height, width = request.frame_shape
    if not request.tiles_vae:
        return *_whole_decode(request, height * width), 0
    config = request.shapes.configs["vae"]
    ratio = config.get("scale_factor_spatial", 8)
    tile, stride = _TILE // ratio, _TILE_STRIDE // ratio
    rows, columns = Tiling(height=tile, width=tile, row_stride=stride, column_stride=stride).starts(height, width)
    size = min(height, tile) * min(width, tile)
    # The last row and column of tiles are as large as what is left.
    positions = sum(min(tile, height - row) for row in rows) * sum(min(tile, width - left) for left in columns)
    features, decoding = _whole_decode(request, size)
    resting = features * positions // size - features
    # Pixels of all tiles are held until they are blended, then the frame as bytes is made of them.
    pixels = 3 * request.batch_size * request.frames_per_block * PIXELS_PER_LATENT * ratio * ratio
    blending = pixels * ((positions + height * width) * request.dtype.itemsize + height * width * 4)
    decoding = max(decoding, blending)
    return (features + resting, decoding, 0) if request.device_type == "cpu" else (features, decoding, resting)


def _whole_decode(request: PlanRequest, num_positions: int) -> tuple[int, int]:
    """Past frames, and the largest moment of a block, of so many latent positions (``WanDecoder3d``).

    Every causal convolution keeps two frames of its input.
    """
    config, itemsize = request.shapes.configs["vae"], request.dtype.itemsize
    base, mult = config.get("decoder_base_dim") or config.get("base_dim", 96), config.get("dim_mult", (1, 2, 4, 4))
    grows = [*reversed(config.get("temperal_downsample", (False, True, True))), None]
    channels, num_convs = config.get("z_dim", 16), 2 * (config.get("num_res_blocks", 2) + 1)
    dims = [base * factor for factor in (mult[-1], *reversed(mult))]
    kept, widest, area, frames = channels + 4 * dims[0], 0, 1, 1
    for index, (before, after, is_temporal) in enumerate(zip(dims, dims[1:], grows, strict=False)):
        first = before // 2 if index and not config.get("is_residual") else before
        widest = max(widest, frames * area * max(first, after))
        kept += area * (first + (num_convs - 1) * after + (after if is_temporal else 0))
        area, frames = area * (1 if is_temporal is None else 4), frames * (2 if is_temporal else 1)
    kept += area * dims[-1]
    latents = request.batch_size * num_positions
    colours = 3 * PIXELS_PER_LATENT * config.get("scale_factor_spatial", 8) ** 2
    done = (request.frames_per_block - 1) * (colours + channels) * itemsize  # earlier frames of the block
    moment = int(_DECODE[request.device_type, itemsize] * widest * itemsize) + done
    return 2 * kept * latents * itemsize, latents * max(
        moment, request.frames_per_block * colours * _PIXEL_BYTES[itemsize]
    )


def _encoding_bytes(request: PlanRequest) -> int:
    """The largest moment of a layer of the text encoder: scores and their softmax, and the tokens."""
    config, num_tokens = request.shapes.configs["text_encoder"], request.num_text_tokens
    scores = (8 + 2 * request.dtype.itemsize) * config["num_heads"] * num_tokens
    return num_tokens * (_TEXT_BYTES[request.dtype.itemsize] * config["d_model"] + scores)


def _read_numbers(folder: Path) -> tuple[int, int]:
    numbers: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                numbers |= {name: prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is no safetensors file: {error}") from error
    return count_numbers(folder.name, numbers)
