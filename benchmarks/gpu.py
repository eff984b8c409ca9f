"""``make bench-gpu``: Wan2.1-1.3B's shapes at 832x480 with random weights, from noise to a closed file, on a GPU.

Nothing is downloaded, for speed and memory do not depend on what the weights say. A policy's figures are of one video:
events on the GPU's stream separate the transformer from the VAE, and nothing waits for them before the end.
"""

import datetime
import itertools
import json
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from benchmarks.models import make_transformer, make_vae
from longtake.cache import make_policy
from longtake.configs.families import load_family
from longtake.configs.loader import load_preset
from longtake.models import StreamingDecoder, VaePixels, use_fast_kernels
from longtake.models.wan import config_of
from longtake.pipelines import LongVideoPipeline
from longtake.pipelines.loading import TRANSFORMERS
from longtake.pipelines.long_video import VideoRollout, to_bytes, to_pixels
from longtake.pipelines.memory_plan import (
    PROGRAM_BYTES,
    UMT5_XXL,
    ModelShapes,
    PlanRequest,
    count_numbers,
    plan_memory,
)
from longtake.pipelines.video_file import VideoFormat, VideoWriter
from longtake.samplers import make_sampler
from longtake.scripts.console import err, out, run_app, wait_briefly

FAMILY = "self_forcing"
POLICIES = ("attention_sink", "deep_forcing", "pack")
WARM_BLOCKS = 2


class Size(StrEnum):
    """What is built."""

    WAN = "wan"
    TINY = "tiny"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Configs of the parts, and the picture.

    Attributes:
        transformer: Config.
        vae: Config.
        height: Pixels.
        width: Pixels.
        num_text_tokens: Length of the text.
    """

    transformer: Mapping[str, Any]
    vae: Mapping[str, Any] = field(default_factory=dict)
    height: int = 480
    width: int = 832
    num_text_tokens: int = 512


TINY_VAE = {
    "base_dim": 4,
    "dim_mult": [1, 1, 1],
    "num_res_blocks": 1,
    "z_dim": 4,
    "temperal_downsample": [True, True],
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 8,
    "scale_factor_temporal": 4,
    "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
}
SHAPES = {
    Size.WAN: Shape(transformer=TRANSFORMERS["1.3B"]),
    Size.TINY: Shape(
        transformer={
            **{"num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4},
            **{"text_dim": 32, "freq_dim": 32, "ffn_dim": 96, "num_layers": 2},
        },
        vae=TINY_VAE,
        height=32,
        width=32,
        num_text_tokens=8,
    ),
}
COLUMNS = {
    "fps_transformer": ("frames/s, transformer", "{:.2f}"),
    "fps_decoded": ("with VAE", "{:.2f}"),
    "fps_file": ("to a closed file", "{:.2f}"),
    "first_frame_s": ("first frame, s", "{:.2f}"),
    "peak_gb": ("peak memory, GB", "{:.2f}"),
    "planned_gb": ("planned", "{:.2f}"),
    "kv_gb": ("keys and values, GB", "{:.2f}"),
    "time_ratio": ("time per block, end to start", "{:.3f}"),
    "memory_ratio": ("memory, end to start", "{:.3f}"),
    "attention": ("attention", "{}"),
}


class Marks:
    """Moments on the device's own time line: events on a GPU, read when all is done; the clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Note this moment."""
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between neighbouring moments; waits for the device."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if not self._is_cuda:
            return [later - earlier for earlier, later in pairs]
        torch.cuda.synchronize()
        return [earlier.elapsed_time(later) / 1000.0 for earlier, later in pairs]


def build(size: Size, dtype: torch.dtype, device: str) -> LongVideoPipeline:
    """A pipeline with random weights made on the device; texts have to be given as embeddings."""
    torch.manual_seed(0)
    shape = SHAPES[size]
    layers = shape.transformer["num_layers"]
    no_text: Any = {"tokenizer": None, "text_encoder": None}
    pipe = LongVideoPipeline(
        **no_text,
        vae=make_vae(shape.vae, dtype, device=device),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0, stochastic_sampling=True),
        transformer=make_transformer(shape.transformer, dtype, num_layers=layers, device=device),
    )
    pipe.family = load_family(FAMILY)
    pipe.set_progress_bar_config(disable=True)
    use_fast_kernels(pipe.vae)
    return pipe


def measure(
    pipe: LongVideoPipeline, size: Size, policy: str, *, seconds: float, device: torch.device
) -> dict[str, Any]:
    """Make one video and take its figures, after a few blocks that are not counted."""
    shape = SHAPES[size]
    embeds = torch.zeros(1, shape.num_text_tokens, pipe.transformer.config.text_dim, dtype=pipe.transformer.dtype)
    settings = {"height": shape.height, "width": shape.width, "cache": load_preset("cache", policy)}

    def start() -> VideoRollout:
        return pipe.start(prompt_embeds=embeds.to(device), seconds=seconds, decode=False, **settings)

    warm = start()
    decoder = StreamingDecoder(pipe.vae)
    for block in itertools.islice(warm.rollout, WARM_BLOCKS):
        decoder.decode(VaePixels(pipe.vae).denormalise(block.latents))
    del warm, decoder
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    session = start()
    taken = _run(pipe, session, shape, device)
    planned = _planned(pipe, shape, session, device.type)
    return {**taken, "planned_gb": planned / 1e9, "attention": attention_name(session, device)}


def _run(pipe: LongVideoPipeline, session: VideoRollout, shape: Shape, device: torch.device) -> dict[str, Any]:
    """From noise to a closed file; events before and after the transformer and the VAE."""
    rollout, decoder, pixels = session.rollout, StreamingDecoder(pipe.vae), VaePixels(pipe.vae)
    marks, memory, first_frame = Marks(device), [], 0.0
    left = session.num_frames
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        video_format = VideoFormat(width=shape.width, height=shape.height, fps=session.fps)
        with VideoWriter(Path(folder) / "video.mp4", video_format=video_format) as writer:
            marks.mark()
            while (block := rollout.next_block()) is not None:
                marks.mark()
                frames = to_pixels(decoder.decode(pixels.denormalise(block.latents)))[:, :left]
                marks.mark()
                left -= frames.shape[1]
                writer.write(to_bytes(frames)[0].cpu().numpy())
                first_frame = first_frame or time.perf_counter() - begin
                memory.append(_allocated(device))
                marks.mark()
        total = time.perf_counter() - begin
    spans = marks.seconds()
    denoise, decode = spans[0::3], spans[1::3]
    return {
        "seconds_of_video": session.num_frames / session.fps,
        "num_blocks": len(denoise),
        "fps_transformer": session.num_frames / sum(denoise),
        "fps_decoded": session.num_frames / (sum(denoise) + sum(decode)),
        "fps_file": session.num_frames / total,
        "first_frame_s": first_frame,
        "peak_gb": _peak(device) / 1e9,
        "kv_gb": rollout.num_cache_bytes / 1e9,
        "time_ratio": _end_to_start(denoise),
        "memory_ratio": _end_to_start(memory),
        "s_per_block": statistics.median(denoise),
    }


def attention_name(session: VideoRollout, device: torch.device) -> str:
    """Which function attends, and on a GPU which of PyTorch's kernels may."""
    name = session.rollout.causal.attention.__name__
    if device.type != "cuda":
        return name
    config, dtype = config_of(session.rollout.causal.transformer), session.rollout.causal.dtype
    q = torch.empty(1, config.num_attention_heads, 128, config.attention_head_dim, dtype=dtype, device=device)
    params = torch.backends.cuda.SDPAParams(q, q, q, None, 0.0, False, False)
    kernels = {
        "flash": torch.backends.cuda.can_use_flash_attention,
        "cudnn": torch.backends.cuda.can_use_cudnn_attention,
        "efficient": torch.backends.cuda.can_use_efficient_attention,
    }
    return f"{name} ({', '.join(kernel for kernel, can in kernels.items() if can(params)) or 'math'})"


def _planned(pipe: LongVideoPipeline, shape: Shape, session: VideoRollout, device_type: str) -> int:
    """The memory plan of the same, the program's own memory left out on a GPU, as PyTorch counts there."""
    parts = {"transformer": pipe.transformer, "vae": pipe.vae}
    numbers = {
        part: count_numbers(part, {name: p.numel() for name, p in model.named_parameters()})
        for part, model in parts.items()
    }
    configs = {"transformer": shape.transformer, "vae": shape.vae, "text_encoder": UMT5_XXL}
    rollout = session.rollout
    request = PlanRequest(
        shapes=ModelShapes(configs, numbers, "random weights"),
        policy=make_policy(rollout.policy),
        sampler=make_sampler(rollout.sampler),
        height=shape.height,
        width=shape.width,
        num_latent_frames=rollout.end_frame,
        frames_per_block=rollout.frames_per_block,
        dtype=rollout.causal.dtype,
        device_type="cuda" if device_type == "cuda" else "cpu",
        num_text_tokens=shape.num_text_tokens,
        text_encoder="freed",
    )
    phases = plan_memory(request).phases
    peak = max(phases["denoising"], phases["decoding"])
    return peak - PROGRAM_BYTES if device_type == "cuda" else peak


def markdown(record: Mapping[str, Any]) -> str:
    """A section for docs/performance.md."""
    machine = record["machine"]
    headings = ["policy", *(heading for heading, _ in COLUMNS.values())]
    lines = [
        f"## {machine['device']}, torch {machine['torch']}, {record['date']}",
        "",
        f"`make bench-gpu`: {record['picture']}, {record['seconds']:g} s of video, {record['dtype']}, random weights "
        f"of size {record['size']}, `{FAMILY}`; {machine['cpu']}, {machine['memory_gb']:.0f} GB on the device.",
        "",
        f"| {' | '.join(headings)} |",
        f"|{'---|' * len(headings)}",
    ]
    for name, row in record["policies"].items():
        cells = [form.format(row[key]) for key, (_, form) in COLUMNS.items()]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def benchmark_gpu(
    size: Annotated[Size, typer.Option(help="wan: 1.3B shapes at 832x480; tiny: for trying this command.")] = Size.WAN,
    seconds: Annotated[float, typer.Option(help="Length of the video.", min=0.5)] = 120,
    policies: Annotated[str, typer.Option(help="Cache policies, with commas.")] = ",".join(POLICIES),
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cuda, or cpu with --size tiny.")] = "cuda",
    out_stem: Annotated[Path, typer.Option("--out", help="Files to write: OUT.json and OUT.md.")] = Path("bench-gpu"),
) -> None:
    """Measure frames per second, first frame, memory and flatness of several policies."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            "bench-gpu needs a CUDA device (24 GB or more for the real shapes) and a PyTorch that sees it; to try the "
            "command without one: --size tiny --device cpu --seconds 1"
        )
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"--dtype {dtype!r} is none of bfloat16, float16, float32")
    names = [name.strip() for name in policies.split(",") if name.strip()]
    for name in names:
        load_preset("cache", name)
    where = torch.device(device)
    pipe = build(size, getattr(torch, dtype), device)
    record = {
        "machine": machine(where),
        "date": datetime.date.today().isoformat(),
        "size": size.value,
        "picture": f"{SHAPES[size].width}x{SHAPES[size].height}",
        "seconds": seconds,
        "dtype": dtype,
        "policies": {},
    }
    for name in names:
        err.print(f"{name} ...", markup=False)
        record["policies"][name] = measure(pipe, size, name, seconds=seconds, device=where)
    text = markdown(record)
    out_stem.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    out_stem.with_suffix(".md").write_text(text, encoding="utf-8")
    out.print(text, markup=False)


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    from benchmarks.rollouts import machine as host
    from longtake.pipelines.memory_plan import machine_memory

    is_cuda = device.type == "cuda"
    return {
        **host(),
        "device": torch.cuda.get_device_name(device) if is_cuda else f"CPU ({platform.machine()})",
        "memory_gb": machine_memory(device.type)[0] / 1e9,
        "cuda": torch.version.cuda,
    }


def _end_to_start(values: Sequence[float]) -> float:
    """Median of the last fifth over that of the second: the first fills the cache."""
    fifth = max(1, len(values) // 5)
    return statistics.median(values[-fifth:]) / statistics.median(values[fifth : 2 * fifth] or values[:1])


def _allocated(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Run the benchmark; what is wrong is said in one line."""
    wait_briefly()
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(benchmark_gpu)
    sys.exit(run_app(app))


if __name__ == "__main__":
    main()
