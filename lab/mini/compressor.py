"""Train the compressor of ``pack`` for a frozen transformer: it is to predict what it predicts with full history.

A block of a clip is denoised twice from the same noise: with all earlier blocks in full, and as ``pack`` reads them:
first blocks in full, the middle compressed, the last block in full. The loss is the mean squared difference of the two
predicted flows. Its gradient runs through the compressed keys and values of every layer, which are made by a forward
of the frozen transformer, into the network alone. All that does not depend on the network is computed once.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from lab.mini.compressor_clips import CELL
from lab.mini.runtime import StageLog, autocast, console, save_atomically
from longtake.cache.policies.pack import LatentCompressor, cell_factors, num_cells, pool_tokens
from longtake.models.wan import AttentionProcessor, blocks_of, config_of, processors_set, project_out
from longtake.rope import apply_phases, axis_frequencies, cell_coordinates, pack_backward, token_phases

CHANNELS = (32, 64, 128, 128)
LEARNING_RATE = 2e-3
FLOW_SHIFT = 3.0  # of the mini model's sampler
SAMPLER_SHARE = 0.5  # of the noise levels are the four-step sampler's
SAMPLER_SIGMAS = (1.0, 0.9, 0.75, 0.5)
UNPROMPTED_IN = 4  # every fourth clip has no prompt, as guidance's second branch
FIRST_CURRENT = 3  # a sink, a compressed block and a recent one come before it
NUM_VALIDATION = 32  # clips
KeysValues = list[tuple[Tensor, Tensor]]
"""Un-rotated keys and values, (batch, tokens, heads, head_dim), by layer."""
_Read = tuple[KeysValues, Tensor | None]


@dataclass
class Forward:
    """Input and output of self-attention in one forward.

    Attributes:
        phases: Of its own tokens, (tokens, head_dim / 2).
        context: Keys and values that it reads, by layer, with the keys' phases; None if they are rotated already.
        mask: (tokens, context + tokens), True where a token reads another; None: everywhere.
        tokens: Added to the patch embedding.
        made: Un-rotated keys and values of its own tokens, by layer.
    """

    phases: Tensor
    context: Sequence[_Read] = ()
    mask: Tensor | None = None
    tokens: Tensor | None = None
    made: KeysValues = field(default_factory=list)


class Reader:
    """Runs a frozen transformer whose self-attention reads what a ``Forward`` says, with gradients.

    Args:
        transformer: diffusers' own.
        grid: Token rows and columns of a frame.
    """

    def __init__(self, transformer: WanTransformer3DModel, grid: tuple[int, int]) -> None:
        self.transformer, self.grid = transformer, grid
        self.frequencies = axis_frequencies(config_of(transformer).attention_head_dim)
        self.forward = Forward(torch.empty(0))

    @contextmanager
    def installed(self) -> Iterator["Reader"]:
        """Put the attention in place, and the stock one back."""
        attentions = [block.attn1 for block in blocks_of(self.transformer)]
        hook = self.transformer.patch_embedding.register_forward_hook(self._add_tokens)
        try:
            with processors_set((attn, _Attention(self, layer)) for layer, attn in enumerate(attentions)):
                yield self
        finally:
            hook.remove()

    def flow(self, x: Tensor, timestep: float | Tensor, prompt: Tensor, forward: Forward) -> Tensor:
        """Predict the flow of (batch, frames, channels, height, width) latents."""
        self.forward = forward
        level = torch.as_tensor(timestep, dtype=torch.float32).expand(len(x))
        with autocast(x.device):
            flow = self.transformer(x.transpose(1, 2), level, prompt, return_dict=False)[0]
        return flow.float().transpose(1, 2)

    def phases(self, starts: Sequence[float], cells: tuple[int, int, int], num_frames: int) -> Tensor:
        """Phases of blocks of ``num_frames`` that start there, each of so many cells."""
        coordinates = cell_coordinates(starts, cells=cells, size=(num_frames, *self.grid))
        return token_phases(coordinates, frequencies=self.frequencies)

    def _add_tokens(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output if self.forward.tokens is None else output + self.forward.tokens


class _Attention(AttentionProcessor[Reader]):
    """Self-attention of a ``Reader``."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        forward, heads = self.owner.forward, (attn.heads, -1)
        q, k = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        q, k, v = (x.float().unflatten(2, heads) for x in (q, k, attn.to_v(hidden_states)))
        q, own = apply_phases(q, forward.phases), apply_phases(k, forward.phases)
        parts = [(*kv[self.layer], phases) for kv, phases in forward.context]
        keys = [keys if phases is None else apply_phases(keys, phases) for keys, _, phases in parts]
        out = attend(q, [*keys, own], [*(values for _, values, _ in parts), v], forward.mask)
        forward.made.append((k, v))
        return project_out(attn, out)


def attend(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Attention of (batch, tokens, heads, head_dim) tensors to parts laid end to end."""
    laid = (q, torch.cat([*keys], dim=1), torch.cat([*values], dim=1))
    out = functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in laid), attn_mask=mask)
    return out.transpose(1, 2)


@dataclass(frozen=True)
class Task:
    """Roles of the blocks of a clip.

    Attributes:
        current: Index of the block that is denoised; the one before it is read in full.
        num_sinks: First blocks that are read in full.
    """

    current: int
    num_sinks: int

    @property
    def mids(self) -> range:
        """Blocks that are compressed."""
        return range(self.num_sinks, self.current - 1)


class Distillation:
    """Differences between full and compressed history on batches of clips.

    Args:
        reader: The frozen transformer, installed.
        frames_per_block: Latent frames of a block.
        kind: ``hr`` or ``hr+lr``; for measuring also ``lr``, ``pool``, and ``drop``: the middle is not read at all.
        network: Of ``hr``.
    """

    def __init__(self, reader: Reader, frames_per_block: int, kind: str, network: LatentCompressor | None) -> None:
        self.reader, self.kind, self.network = reader, kind, network
        self.size = (frames_per_block, *reader.grid)
        self.cells = num_cells(self.size, cell_factors(self.size, CELL))

    def loss(self, task: Task, lessons: "Lessons", rows: Tensor) -> Tensor:
        """Mean squared difference of the flow of a block to the recorded one, with gradients to the network."""
        tokens, frames = math.prod(self.size), self.size[0]
        sinks, recent = slice(0, task.num_sinks * tokens), slice((task.current - 1) * tokens, task.current * tokens)
        first, last = (
            [(k[rows, part].float(), v[rows, part].float()) for k, v in lessons.full] for part in (sinks, recent)
        )
        phases = self.reader.phases([float(i * frames) for i in task.mids], self.cells, frames)
        latents, pooled, prompt = (x[rows].float() for x in (lessons.latents, lessons.pooled, lessons.prompts))
        middle = self._encoded(task, latents, pooled, prompt, (first, None), phases)
        noisy, sigma, whole = (x[rows] for x in lessons.wanted[task.current])
        own = self.reader.phases([float(task.current * frames)], self.size, frames)
        reads = Forward(own, context=[(first, None), (middle, phases), (last, None)])
        return (self.reader.flow(noisy, 1000.0 * sigma, prompt, reads) - whole).square().mean()

    @torch.no_grad()
    def flow_error(self, task: Task, lessons: "Lessons", rows: Tensor, generator: torch.Generator) -> Tensor:
        """Mean squared difference of the predicted flows of a block, every layer reading compressed history."""
        frames, start = self.size[0], task.current * self.size[0]
        latents, pooled, prompt = (x[rows].float() for x in (lessons.latents, lessons.pooled, lessons.prompts))
        noisy, sigma = noised(latents[:, start : start + frames], generator)
        own = self.reader.phases([start], self.size, frames)
        phases = self.reader.phases([float(i * frames) for i in range(task.current)], self.size, frames)
        clean = Forward(phases, mask=causal_mask(task.current, math.prod(self.size)))
        self.reader.flow(latents[:, :start], 0.0, prompt, clean)
        whole = self.reader.flow(noisy, 1000.0 * sigma, prompt, Forward(own, context=[(clean.made, phases)]))
        context = self._packed(task, latents, pooled, prompt, clean.made)
        return (self.reader.flow(noisy, 1000.0 * sigma, prompt, Forward(own, context=context)) - whole).square().mean()

    def _packed(self, task: Task, latents: Tensor, pooled: Tensor, prompt: Tensor, full: KeysValues) -> list[_Read]:
        frames, mids = self.size[0], task.mids
        is_dropped = self.kind == "drop"
        count = 0 if is_dropped else len(mids)
        starts = pack_backward([frames] * (task.num_sinks + count + 1), float(task.current * frames))
        tokens = math.prod(self.size)

        def part(first: int, last: int) -> KeysValues:
            return [(k[:, first * tokens : last * tokens], v[:, first * tokens : last * tokens]) for k, v in full]

        sinks: _Read = part(0, task.num_sinks), self.reader.phases(starts[: task.num_sinks], self.size, frames)
        recent: _Read = part(task.current - 1, task.current), self.reader.phases(starts[-1:], self.size, frames)
        if not count:
            return [sinks, recent]
        phases = self.reader.phases(starts[task.num_sinks : -1], self.cells, frames)
        if self.kind == "pool":
            middle = [(self._pooled(k, count), self._pooled(v, count)) for k, v in part(mids.start, mids.stop)]
        else:
            middle = self._encoded(task, latents, pooled, prompt, sinks, phases)
        compressed: _Read = (middle, phases)
        return [sinks, compressed, recent]

    def _pooled(self, x: Tensor, count: int) -> Tensor:
        blocks = x.unflatten(1, (count, -1)).flatten(0, 1)
        return pool_tokens(blocks, self.size, self.cells).unflatten(0, (-1, count)).flatten(1, 2).contiguous()

    def _encoded(
        self, task: Task, latents: Tensor, pooled: Tensor, prompt: Tensor, sinks, phases: Tensor
    ) -> KeysValues:
        """Keys and values of the compressed blocks; each sees the sinks and the compressed blocks before it."""
        frames, mids = self.size[0], task.mids
        small = pooled[:, mids.start : mids.stop].flatten(1, 2)
        if "lr" not in self.kind:
            small = torch.zeros_like(small)
        forward = Forward(phases, context=[sinks])
        if self.network is not None:
            clips = (
                latents[:, mids.start * frames : mids.stop * frames].unflatten(1, (len(mids), frames)).flatten(0, 1)
            )
            made = self.network(clips, self.cells).unflatten(0, (-1, len(mids)))
            forward.tokens = made.transpose(1, 2).flatten(2, 3)
        own = causal_mask(len(mids), math.prod(self.cells))
        seen = torch.ones(len(own), task.num_sinks * math.prod(self.size), dtype=torch.bool)
        forward.mask = torch.cat([seen, own], dim=1)
        self.reader.flow(small, 0.0, prompt, forward)
        return forward.made


def causal_mask(num_blocks: int, tokens: int) -> Tensor:
    """(all, all) bool: a token reads its own block and those before it."""
    block = torch.arange(num_blocks).repeat_interleave(tokens)
    return block[:, None] >= block[None]


def noised(clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise (batch, frames, channels, height, width) latents as the sampler does, half of them at its four levels.

    Returns:
        The noisy latents and their noise shares, (batch,).
    """
    uniform = torch.rand(len(clean), generator=generator)
    sigma = FLOW_SHIFT * uniform / (1.0 + (FLOW_SHIFT - 1.0) * uniform)
    picks = torch.tensor(SAMPLER_SIGMAS)[torch.randint(len(SAMPLER_SIGMAS), uniform.shape, generator=generator)]
    sigma = torch.where(torch.rand(len(clean), generator=generator) < SAMPLER_SHARE, picks, sigma)
    share = sigma[:, None, None, None, None]
    return (1.0 - share) * clean + share * torch.randn(clean.shape, generator=generator), sigma


@dataclass
class Lessons:
    """Encoded clips in memory, and what the transformer does with their full history, which is computed once.

    Attributes:
        latents: (clips, frames, channels, height, width).
        pooled: (clips, blocks, frames, channels, rows, columns).
        prompts: (clips, text_len, text_dim).
        full: Rotated keys and values of the clean clips by layer, bfloat16.
        wanted: Of every block that is denoised: noisy latents, noise shares, and the flow with full history.
    """

    latents: Tensor
    pooled: Tensor
    prompts: Tensor
    full: KeysValues = field(default_factory=list)
    wanted: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)

    @property
    def num_blocks(self) -> int:
        """Blocks of a clip."""
        return self.pooled.shape[1]

    @torch.no_grad()
    def fill(self, reader: Reader, frames: int, *, batch: int = 16) -> None:
        """Compute ``full`` and ``wanted`` of the clips that are trained on, with one noise per block."""
        size, last, generator = (frames, *reader.grid), self.num_blocks - 1, torch.Generator().manual_seed(1)
        tokens = math.prod(size)
        phases = reader.phases([float(i * frames) for i in range(last)], size, frames)
        full, wanted = [], {current: [] for current in range(FIRST_CURRENT, self.num_blocks)}
        for start in range(0, len(self.latents) - NUM_VALIDATION, batch):
            rows = slice(start, min(start + batch, len(self.latents) - NUM_VALIDATION))
            latents, prompt = self.latents[rows].float(), self.prompts[rows]
            clean = Forward(phases, mask=causal_mask(last, tokens))
            reader.flow(latents[:, : last * frames], 0.0, prompt, clean)
            rotated = [(apply_phases(k, phases), v) for k, v in clean.made]
            full.append([(k.bfloat16(), v.bfloat16()) for k, v in rotated])
            for current, parts in wanted.items():
                noisy, sigma = noised(latents[:, current * frames : (current + 1) * frames], generator)
                before = [(k[:, : current * tokens], v[:, : current * tokens]) for k, v in rotated]
                block = reader.phases([float(current * frames)], size, frames)
                whole = reader.flow(noisy, 1000.0 * sigma, prompt, Forward(block, context=[(before, None)]))
                parts.append((noisy, sigma, whole))
        layers = [zip(*layer, strict=True) for layer in zip(*full, strict=True)]
        self.full = [(torch.cat(keys), torch.cat(values)) for keys, values in layers]
        self.wanted = {i: tuple(map(torch.cat, zip(*parts, strict=True))) for i, parts in wanted.items()}


def draw_task(num_blocks: int, generator: torch.Generator) -> Task:
    """Draw a block with at least one compressed block before it, and one or two sinks."""
    current = int(torch.randint(FIRST_CURRENT, num_blocks, (1,), generator=generator))
    return Task(current, 1 + int(torch.randint(min(2, current - 2), (1,), generator=generator)))


@torch.no_grad()
def measure(distillation: Distillation, lessons: Lessons, *, num_batches: int = 16, batch: int = 8) -> Tensor:
    """``flow_error`` on the held-back clips, (batches,); the same noise and tasks for every compressor."""
    generator = torch.Generator().manual_seed(7)
    first, errors = len(lessons.latents) - NUM_VALIDATION, []
    for _ in range(num_batches):
        task = draw_task(lessons.num_blocks, generator)
        rows = first + torch.randperm(NUM_VALIDATION, generator=generator)[:batch]
        errors.append(distillation.flow_error(task, lessons, rows, generator))
    return torch.stack(errors)


def train_compressor(
    work: Path, reader: Reader, lessons: Lessons, *, kind: str, frames_per_block: int, minutes: float, batch: int = 8
) -> LatentCompressor:
    """Train, or go on with, a network for ``minutes`` in all.

    Args:
        work: Folder of the checkpoint ``KIND.pt`` and the log ``KIND.jsonl``.
        reader: The frozen transformer, installed.
        lessons: What is to be matched.
        kind: ``hr`` or ``hr+lr``.
        frames_per_block: Latent frames of a block.
        minutes: Length of the whole training, which the learning rate follows.
        batch: Clips per step.
    """
    torch.manual_seed(0)
    checkpoint = work / f"{kind}.pt"
    width = reader.transformer.patch_embedding.out_channels
    network = LatentCompressor(lessons.latents.shape[2], width, CHANNELS)
    optimiser = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    step, spent = 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(saved["network"])
        optimiser.load_state_dict(saved["optimiser"])
        step, spent = saved["step"], saved["seconds"]
    log = StageLog(work / f"{kind}.jsonl", 60.0 * minutes, spent_seconds=spent)
    distillation = Distillation(reader, frames_per_block, kind, network)
    generator = torch.Generator().manual_seed(step)
    num_clips, losses = len(lessons.latents) - NUM_VALIDATION, []
    console.print(f"{kind}: {sum(p.numel() for p in network.parameters()) / 1e3:.0f} k parameters, from step {step}")

    def save() -> None:
        state = {"network": network.state_dict(), "optimiser": optimiser.state_dict()}
        save_atomically({**state, "step": step, "seconds": log.spent}, checkpoint)

    while (progress := log.advance()) < 1.0:
        decay = 0.02 + 0.98 * (1.0 + math.cos(math.pi * progress)) / 2
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 50) * decay
        rows = torch.randint(num_clips, (batch,), generator=generator)
        loss = distillation.loss(draw_task(lessons.num_blocks, generator), lessons, rows)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        step += 1
        losses.append(loss.detach())
        if step % 25 == 0:
            log.write(step=step, loss=float(torch.stack(losses).mean()))
            losses = []
            save()
    save()
    return network


def save_compressor(network: LatentCompressor, path: Path) -> None:
    """Write the weights as float16 safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in network.state_dict().items()}, path)
