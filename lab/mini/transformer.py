"""Train the mini model's transformer and text encoder by teacher forcing on encoded clips."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from lab.mini.optim import OptimiserPair, WeightAverage
from lab.mini.runtime import (
    StageLog,
    autocast,
    average_gradients,
    console,
    rank,
    save_atomically,
    shared_progress,
)
from lab.mini.teacher_forcing import ContextLayout, TeacherForcingPlan, predict_flow, teacher_forcing
from lab.mini.text import TEXT_DIM, build_text_encoder, build_tokenizer, encode_text, tokenize
from lab.mini.vae import Z_DIM

NUM_BLOCKS, FRAMES_PER_BLOCK, TOKEN_SIDE = 7, 3, 4
FLOW_SHIFT = 2.0
SAMPLER_SIGMAS = (1.0, 0.8571, 0.6667, 0.4)  # where the four-step sampler asks for a prediction
SAMPLER_SHARE = 0.15  # of the noise levels are drawn from them
CONTEXT_NOISE = 0.2
PROMPT_DROPOUT = 0.1
FIRST_BLOCK_WEIGHT = 4.0  # it carries the prompt and is a seventh of the loss
LEARNING_RATES = (2e-3, 1.5e-3)
LAYOUTS = (
    (0.45, ContextLayout()),
    (0.07, ContextLayout(num_window_blocks=1)),
    (0.08, ContextLayout(num_window_blocks=2)),
    (0.08, ContextLayout(num_window_blocks=3)),
    (0.07, ContextLayout(num_window_blocks=4)),
    (0.08, ContextLayout(num_window_blocks=1, num_sink_blocks=1, is_contiguous=True)),
    (0.09, ContextLayout(num_window_blocks=2, num_sink_blocks=1, is_contiguous=True)),
    (0.08, ContextLayout(num_window_blocks=3, num_sink_blocks=1, is_contiguous=True)),
)


class MiniModel(nn.Module):
    """The two trained parts under one roof."""

    def __init__(self) -> None:
        """Build untrained parts."""
        super().__init__()
        self.transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=6,
            attention_head_dim=32,
            in_channels=Z_DIM,
            out_channels=Z_DIM,
            text_dim=TEXT_DIM,
            freq_dim=128,
            ffn_dim=768,
            num_layers=6,
            cross_attn_norm=True,
            rope_max_seq_len=1024,
        )
        nn.init.zeros_(self.transformer.proj_out.weight)
        self.text_encoder: UMT5EncoderModel = build_text_encoder(len(build_tokenizer()))

    def load_exported(self, folder: Path) -> None:
        """Start from the weights of an exported diffusers folder."""
        transformer = WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
        text_encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        self.transformer.load_state_dict(transformer.state_dict())
        self.text_encoder.load_state_dict(text_encoder.state_dict())


def build_optimiser(model: MiniModel) -> OptimiserPair:
    """Muon on the matrices of the transformer's blocks, AdamW on everything else."""
    matrices = [p for name, p in model.transformer.blocks.named_parameters() if p.ndim == 2 and "table" not in name]
    chosen = {id(p) for p in matrices}
    return OptimiserPair(matrices, [p for p in model.parameters() if id(p) not in chosen], lr=LEARNING_RATES)


def draw_sigmas(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Draw noise shares: uniform, flow-shifted, and a quarter of them exactly where the sampler will stand."""
    uniform = torch.rand(shape, generator=generator)
    sigmas = FLOW_SHIFT * uniform / (1.0 + (FLOW_SHIFT - 1.0) * uniform)
    picks = torch.tensor(SAMPLER_SIGMAS)[torch.randint(len(SAMPLER_SIGMAS), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < SAMPLER_SHARE, picks, sigmas)


def per_frame(blocks: Tensor) -> Tensor:
    """Spread (B, blocks) over frames for products with (B, C, F, H, W)."""
    return blocks.repeat_interleave(FRAMES_PER_BLOCK, dim=1)[:, None, :, None, None]


def loss_per_block(
    model: MiniModel,
    plan: TeacherForcingPlan,
    latents: Tensor,
    text: tuple[Tensor, Tensor],
    generator: torch.Generator,
) -> Tensor:
    """Return the mean squared error of the flow per block, (blocks,), on a batch of (B, C, F, H, W) latents."""
    batch, device = len(latents), latents.device
    sigmas = draw_sigmas((batch, NUM_BLOCKS), generator).to(device)
    is_noised = torch.rand((batch, 1), generator=generator) < 0.5
    context_sigmas = (CONTEXT_NOISE * torch.rand((batch, NUM_BLOCKS), generator=generator) * is_noised).to(device)
    noise = torch.randn((2, *latents.shape), generator=generator).to(device)
    share, context_share = per_frame(sigmas), per_frame(context_sigmas)
    with autocast(device):
        flow = predict_flow(
            model.transformer,
            plan,
            clean=(1.0 - context_share) * latents + context_share * noise[0],
            noisy=(1.0 - share) * latents + share * noise[1],
            clean_timesteps=1000.0 * context_sigmas,
            noisy_timesteps=1000.0 * sigmas,
            prompt_embeds=encode_text(model.text_encoder, *text),
        )
    error = (flow.float() - (noise[1] - latents)).square()
    return error.unflatten(2, (NUM_BLOCKS, FRAMES_PER_BLOCK)).mean(dim=(0, 1, 3, 4, 5))


class ClipSource:
    """Random batches of encoded clips with their captions' tokens, some of them blanked."""

    def __init__(self, work: Path, seed: int) -> None:
        """Read what :func:`encode_latents` wrote."""
        self.latents = np.load(work / "latents.npy", mmap_mode="r")
        captions = json.loads((work / "captions.json").read_text())
        self.ids, self.mask = tokenize(build_tokenizer(), [*captions, ""])
        self.rng = np.random.default_rng(seed)

    def draw(self, batch: int, device: torch.device) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return (latents, (token ids, mask)) of ``batch`` clips."""
        rows = self.rng.integers(len(self.latents), size=batch)
        captions = torch.from_numpy(np.where(self.rng.random(batch) < PROMPT_DROPOUT, len(self.latents), rows))
        latents = torch.from_numpy(np.stack([self.latents[row] for row in rows])).float().to(device)
        return latents, (self.ids[captions].to(device), self.mask[captions].to(device))


def average_decay(step: int, progress: float) -> float:
    """Return the decay of the weight average: quick at first, long in the middle, short when the rate has decayed."""
    return min(0.99 if progress > 0.9 else 0.998, 1.0 - 1.0 / (0.2 * step + 1.0))


def rate_factor(step: int, progress: float) -> float:
    """Return the learning-rate factor: warm-up, constant to 40 %, linear to 2 %."""
    return min(1.0, (step + 1) / 100, 0.02 + 0.98 * (1.0 - progress) / 0.6)


def train_transformer(
    work: Path, device: torch.device, *, minutes: float, batch: int = 4, init_from: Path | None = None
) -> None:
    """Train (or resume) for ``minutes`` in all; alone or as one of the workers of :func:`runtime.launch`.

    Args:
        work: Folder with the encoded clips; the checkpoint is ``transformer.pt`` there.
        device: Where to train.
        minutes: Length of the whole training, which the learning rate's decay follows.
        batch: Clips per worker and step.
        init_from: Exported folder to take the first weights from when there is no checkpoint.
    """
    torch.manual_seed(0)
    checkpoint = work / "transformer.pt"
    model = MiniModel()
    if init_from is not None:
        model.load_exported(init_from)
    model.to(device)
    optimiser, average, step, spent = build_optimiser(model), WeightAverage(model), 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location=device)
        model.load_state_dict(saved["live"])
        optimiser.load_state_dict(saved["optimiser"])
        average.values, step, spent = saved["average"], saved["step"], saved["seconds"]
    plan = TeacherForcingPlan(
        num_blocks=NUM_BLOCKS, frames_per_block=FRAMES_PER_BLOCK, rows=TOKEN_SIDE, columns=TOKEN_SIDE
    )
    source = ClipSource(work, seed=1000 * step + rank())
    log = StageLog(work / "transformer.jsonl", 60.0 * minutes, spent_seconds=spent)
    console.print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, from step {step}")

    def save(step: int) -> None:
        state = {"live": model.state_dict(), "average": average.values, "optimiser": optimiser.state_dict()}
        save_atomically({**state, "step": step, "seconds": log.spent}, checkpoint)

    with teacher_forcing(model.transformer, plan):
        step = _train_steps(model, plan, source, optimiser, average, log, step=step, batch=batch, save_state=save)
    if rank() == 0:
        save(step)


def _train_steps(
    model: MiniModel,
    plan: TeacherForcingPlan,
    source: ClipSource,
    optimiser: OptimiserPair,
    average: WeightAverage,
    log: StageLog,
    *,
    step: int,
    batch: int,
    save_state: Callable[[int], None],
) -> int:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(1000 * step + rank())
    weights = torch.ones(NUM_BLOCKS, device=device)
    weights[0] = FIRST_BLOCK_WEIGHT
    weights /= weights.sum()
    losses, norms, saved_at = [], [], log.spent
    while (progress := shared_progress(log.advance())) < 1.0:
        plan.layout = LAYOUTS[source.rng.choice(len(LAYOUTS), p=[share for share, _ in LAYOUTS])][1]
        latents, text = source.draw(batch, device)
        per_block = loss_per_block(model, plan, latents, text, generator)
        (per_block * weights).sum().backward()
        average_gradients(optimiser.params)
        norms.append(optimiser.step(rate_factor(step, progress)))
        step += 1
        average.update(model, average_decay(step, progress))
        losses.append(per_block.detach())
        if step % 25 == 0:
            mean = torch.stack(losses).mean(dim=0)
            parts = {"first": float(mean[0]), "later": float(mean[3:].mean()), "norm": sum(norms) / len(norms)}
            log.write(step=step, loss=float(mean.mean()), **parts)
            losses, norms = [], []
        if rank() == 0 and log.spent - saved_at > 240.0:
            save_state(step)
            saved_at = log.spent
    return step
