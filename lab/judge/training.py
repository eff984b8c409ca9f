"""Training of the judge: true renders, disturbed a little, labelled by the scene that drew them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from lab.scenes import object_state, training_scene
from longtake.evaluation.mini_world.judge import ATTRIBUTES, CLIP_FRAMES, FRAME_STRIDE, ClipJudge, expected_verdict
from longtake.evaluation.mini_world.scenes import FPS, SIZE, Scene, describe, parse_caption, render

IGNORE = -100
HORIZON = 60 * FPS  # clips start anywhere in the first minute, as the drift study's windows do
SCENE_SEED = 7000  # the judge's training scenes are not the mini model's
RoundTrip = Callable[[Tensor], Tensor]
Example = tuple[np.ndarray, dict[str, str], np.ndarray]


@dataclass(frozen=True)
class ClipBatch:
    """Clips with their labels.

    Attributes:
        clips: (batch, CLIP_FRAMES, 3, 64, 64) in [0, 1].
        labels: {attribute: (batch,) int64}, IGNORE where the label is not defined.
        state: (batch, CLIP_FRAMES, 4): x, y, radius of the main object in half frames, and visible 0 or 1.
    """

    clips: Tensor
    labels: dict[str, Tensor]
    state: Tensor


def save_judge(judge: ClipJudge, path: Path, *, notes: Mapping[str, str]) -> None:
    """Write weights as float16 safetensors, with notes (training figures) as metadata."""
    tensors = {
        name: tensor.half().contiguous() if tensor.is_floating_point() else tensor.contiguous()
        for name, tensor in judge.state_dict().items()
    }
    save_file(tensors, path, metadata=dict(notes))


def clip_indices(start: int) -> np.ndarray:
    """Frame indices the judge looks at, for a clip that starts at frame ``start``."""
    return start + FRAME_STRIDE * np.arange(CLIP_FRAMES)


def without_object(scene: Scene) -> Scene:
    """The same background with nobody in front of it."""
    return replace(scene, event="none", second=None, actor=replace(scene.actor, anchor_x=-1000.0, anchor_y=-1000.0))


def doubled(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same scene with a twin of its object elsewhere: what a model that draws one object twice would show."""
    angle, distance = rng.uniform(0.0, 2.0 * np.pi), rng.uniform(20.0, 34.0)
    actor = scene.actor
    shrunk = replace(actor, radius=actor.radius * 0.75, reach=actor.reach * rng.uniform(0.4, 0.8))
    shift_x, shift_y = 0.5 * distance * np.cos(angle), 0.5 * distance * np.sin(angle)
    phase = actor.phase + (0.0 if rng.random() < 0.5 else rng.uniform(0.0, 2.0 * np.pi))
    first = replace(shrunk, anchor_x=32.0 + shift_x, anchor_y=32.0 + shift_y)
    return replace(
        scene,
        actor=first,
        event="none",
        second=replace(first, anchor_x=32 - shift_x, anchor_y=32 - shift_y, phase=phase),
    )


def label_scene(scene: Scene, indices: np.ndarray) -> tuple[dict[str, str], np.ndarray]:
    """Name what the frames truly show.

    Args:
        scene: the scene.
        indices: (F,) frame indices of the clip.

    Returns:
        {attribute: name} with undefined ones left out, and the (F, 4) state of the main object.
    """
    first = object_state(scene, indices)
    visible = first.visibility > 0.3
    state = np.concatenate([first.center / 32.0 - 1.0, first.radius[:, None] / 32.0, visible[:, None]], axis=1)
    names = expected_verdict(parse_caption(describe(scene)))
    if scene.event == "none" and scene.second is None:
        names["speed"] = scene.actor.speed  # true even where the caption does not say it
    if not visible.any():
        names = {key: names[key] for key in ("background", "texture", "camera")} | {"count": "none", "event": "none"}
    elif scene.second is not None:
        second = object_state(scene, indices, which="second")
        apart = np.hypot(*(first.center - second.center).T) > 0.9 * (first.radius + second.radius)
        is_twin = (scene.second.shape, scene.second.colour) == (scene.actor.shape, scene.actor.colour)
        if is_twin:
            names = {key: value for key, value in names.items() if key not in ("motion", "speed")}
            state[:] = np.nan
        if (apart & (second.visibility > 0.3) & visible).mean() < 0.3:
            del names["count"]
    return names, state


def _draw_example(index: int) -> tuple[Scene, int, dict[str, str], np.ndarray]:
    rng = np.random.default_rng([SCENE_SEED, index])
    scene = training_scene(index, SCENE_SEED)
    kind = rng.random()
    if kind < 0.06:
        scene = without_object(scene)
    elif kind < 0.16:
        scene = doubled(scene, rng)
    start = int(rng.integers(HORIZON))
    return scene, start, *label_scene(scene, clip_indices(start))


def training_example(index: int) -> Example:
    """Draw clip ``index``, a pure function of the index: (CLIP_FRAMES, 64, 64, 3) uint8, its names and its state.

    Hard and rare cases are drawn more often than the world does: twins, empty scenes.
    """
    scene, start, names, state = _draw_example(index)
    return render(scene, clip_indices(start)), names, state


def collate(examples: Sequence[Example]) -> ClipBatch:
    """Stack examples of :func:`training_example` into one batch of tensors."""
    clips = torch.from_numpy(np.stack([clip for clip, _, _ in examples])).permute(0, 1, 4, 2, 3).float() / 255.0
    labels = {
        name: torch.tensor([kinds.index(names[name]) if name in names else IGNORE for _, names, _ in examples])
        for name, kinds in ATTRIBUTES.items()
    }
    return ClipBatch(clips, labels, torch.from_numpy(np.stack([state for _, _, state in examples])).float())


def vae_round_trip(vae: Any) -> RoundTrip:
    """Encode and decode of (batch, F, 3, H, W) videos in [0, 1] by a diffusers ``AutoencoderKLWan``; F = 1 + 4 k."""

    @torch.inference_mode()
    def round_trip(videos: Tensor) -> Tensor:
        latents = vae.encode(videos.transpose(1, 2) * 2.0 - 1.0).latent_dist.mode()
        return (vae.decode(latents).sample.float() * 0.5 + 0.5).clamp(0.0, 1.0).transpose(1, 2)

    return round_trip


def round_trip_examples(round_trip: RoundTrip, *, first: int, count: int, lead: int = 4) -> Iterator[Example]:
    """Draw clips and send them through a VAE.

    Args:
        round_trip: of :func:`vae_round_trip`.
        first: index of the first clip.
        count: clips.
        lead: latent frames before the clip at most, so that not every clip begins at the VAE's first frame.

    Yields:
        What :func:`training_example` returns, with the VAE's picture.
    """
    for index in range(first, first + count):
        scene, start, names, state = _draw_example(index)
        ahead = FRAME_STRIDE * int(np.random.default_rng([SCENE_SEED, 1, index]).integers(lead + 1))
        video = render(scene, np.arange(start - ahead, start + CLIP_FRAMES * FRAME_STRIDE + 1))
        clean = torch.from_numpy(video)[None].permute(0, 1, 4, 2, 3).float() / 255.0
        clip = round_trip(clean)[0, ahead : ahead + CLIP_FRAMES * FRAME_STRIDE : FRAME_STRIDE]
        yield (clip.permute(0, 2, 3, 1) * 255.0).round().to(torch.uint8).numpy(), names, state


def disturb(clips: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, tint and roughen each clip a little, by one random strength per clip.

    Args:
        clips: (batch, frames, 3, H, W) in [0, 1].
        generator: source of every choice.

    Returns:
        Same shape, in [0, 1].
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(clips.shape[0], *shape, generator=generator)

    flat = clips.flatten(1, 2)
    share = uniform(-0.6, 1.0, 1, 1, 1).clamp(min=0.0)
    flat = torch.lerp(flat, F.avg_pool2d(F.pad(flat, (1, 1, 1, 1), mode="replicate"), 3, stride=1), share)
    clips = flat.view_as(clips)
    clips = clips * uniform(0.93, 1.07, 1, 3, 1, 1) + uniform(-0.03, 0.03, 1, 3, 1, 1)
    # One sheet of noise per step, seen through windows at random places: fresh noise would cost more than the judge.
    sheet = torch.randn(3, 2 * SIZE, 2 * SIZE, generator=generator)
    sheet += 0.7 * F.interpolate(torch.randn(1, 3, SIZE // 4, SIZE // 4, generator=generator), scale_factor=8)[0]
    strength = uniform(-0.04, 0.04).clamp(min=0.0)
    places = torch.randint(SIZE, (*clips.shape[:2], 2), generator=generator).tolist()
    for clip, rows, share in zip(clips, places, strength.tolist(), strict=True):
        if share > 0.0:
            for frame, (top, left) in zip(clip, rows, strict=True):
                frame.add_(sheet[:, top : top + SIZE, left : left + SIZE], alpha=share)
    return clips.clamp_(0.0, 1.0)


def judge_loss(judge: ClipJudge, batch: ClipBatch) -> Tensor:
    """Cross-entropy of every attribute plus the error of the main object's state."""
    logits, state = judge(batch.clips)
    loss = sum(
        F.cross_entropy(logits[name].float(), batch.labels[name], ignore_index=IGNORE, reduction="sum")
        / (batch.labels[name] != IGNORE).sum().clamp(min=1)
        for name in ATTRIBUTES
    )
    known = ~batch.state[..., 3].isnan()
    truth, found = batch.state[known], state.float()[known]
    visible = truth[:, 3:]
    place = (visible * F.smooth_l1_loss(found[:, :3], truth[:, :3], beta=0.1, reduction="none")).mean()
    return loss + 10.0 * place + F.binary_cross_entropy_with_logits(found[:, 3:], visible)


def train_judge(
    judge: ClipJudge,
    *,
    num_clips: int,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    first_clip: int = 0,
    extra: Sequence[Example] = (),
    report: Callable[[int, float], None] = lambda clips, loss: None,
) -> ClipJudge:
    """Train on freshly rendered clips, every one seen once.

    Args:
        judge: fresh or trained before; changed in place.
        num_clips: clips to train on.
        batch_size: clips per step.
        learning_rate: peak; linear warm-up over 5 %, linear to zero after.
        first_clip: index of the first clip; continue with others than before.
        extra: clips of :func:`round_trip_examples`; a quarter of every batch is drawn from them, again and again.
        report: called after every step with the clips seen and the loss.

    Returns:
        The same judge, in evaluation mode.
    """
    generator = torch.Generator().manual_seed(first_clip)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=learning_rate, weight_decay=0.02)
    num_steps = max(1, num_clips // batch_size)
    judge.train()
    num_extra = batch_size // 4 if extra else 0
    num_fresh = batch_size - num_extra
    for step in range(num_steps):
        start = first_clip + step * num_fresh
        examples = [training_example(index) for index in range(start, start + num_fresh)]
        batch = collate(examples + [extra[(step * num_extra + index) % len(extra)] for index in range(num_extra)])
        share = (step + 1) / num_steps
        optimizer.param_groups[0]["lr"] = learning_rate * min(share / 0.05, (1.0 - share) / 0.95 + 1e-3)
        batch = replace(batch, clips=disturb(batch.clips, generator))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = judge_loss(judge, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(judge.parameters(), 2.0)
        optimizer.step()
        report((step + 1) * batch_size, loss.item())
    return judge.eval()
