"""The judge: a small classifier that names what a five-second clip of the moving scenes shows.

It is trained on true renders only (``lab/judge/training.py``), never on generated video: its verdict on a generated
clip is what the clip would have to be if it were a true scene.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from longtake.evaluation.mini_world.scenes import (
    BACKGROUNDS,
    CAMERAS,
    COLOURS,
    EVENTS,
    FPS,
    MOTIONS,
    SHAPES,
    SIZE,
    SPEEDS,
    TEXTURES,
)

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "background": tuple(BACKGROUNDS),
    "texture": TEXTURES,
    "motion": MOTIONS,
    "count": ("none", "one", "two"),
    "camera": tuple(CAMERAS),
    "speed": tuple(SPEEDS),
    "event": tuple(EVENTS),
}
FRAME_STRIDE = 4  # the judge looks at every fourth frame, a quarter of a second apart
CLIP_FRAMES = 20  # looked at: 20 quarters of a second
CLIP_SECONDS = CLIP_FRAMES * FRAME_STRIDE / FPS
WEIGHTS = Path(__file__).with_name("judge.safetensors")


class ClipJudge(nn.Module):
    """A convolutional network per frame and its change since the frame before, and a convolution over time.

    What a frame shows is pooled over the picture, so that a star is a star wherever it is; where it is comes from a
    second path that keeps places apart. The main object's place and size per frame are outputs of their own: motion
    is easier to learn from places than from five-second labels alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.PixelUnshuffle(2),
            _stage(24, 40, 2),
            _stage(40, 48, 1),
            _stage(48, 64, 2),
            _stage(64, 80, 1),
        )
        self.place = nn.Sequential(nn.Conv2d(80, 16, 1), nn.Flatten(), nn.Linear(16 * (SIZE // 8) ** 2, 96), nn.ReLU())
        self.state = nn.Linear(96, 4)
        self.temporal = nn.Sequential(
            nn.Conv1d(260, 96, 5, padding=2),
            nn.ReLU(),
            nn.Conv1d(96, 96, 5, padding=4, dilation=2),
            nn.ReLU(),
        )
        self.heads = nn.ModuleDict({name: nn.Linear(2 * 96 + 160, len(kinds)) for name, kinds in ATTRIBUTES.items()})

    def forward(self, clips: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Judge clips.

        Args:
            clips: (batch, CLIP_FRAMES, 3, 64, 64), RGB in [0, 1], a quarter of a second apart.

        Returns:
            Logits per attribute, (batch, kinds) each, in the order of :data:`ATTRIBUTES`; and per frame
            (batch, frames, 4) the main object's x, y, radius in units of half a frame, and visibility logit.
        """
        batch, frames = clips.shape[:2]
        before = torch.cat([clips[:, 1:2], clips[:, :-1]], dim=1)
        pictures = torch.cat([clips * 4.0 - 1.0, (clips - before) * 2.0], dim=2).flatten(0, 1)
        maps = self.trunk(pictures.contiguous(memory_format=torch.channels_last))
        place = self.place(maps)
        state = self.state(place)
        look = torch.cat([maps.amax(dim=(2, 3)), maps.mean(dim=(2, 3))], dim=1)
        steps = torch.cat([look, place, state], dim=1).unflatten(0, (batch, frames)).transpose(1, 2)
        hidden = self.temporal(steps)
        pooled = torch.cat([hidden.mean(dim=2), hidden.amax(dim=2), steps[:, :160].mean(dim=2)], dim=1)
        return {name: head(pooled) for name, head in self.heads.items()}, state.unflatten(0, (batch, frames))


def _stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


def load_judge(path: Path = WEIGHTS) -> ClipJudge:
    """Load the judge, float32, in evaluation mode."""
    if not path.is_file():
        raise ValueError(f"judge weights {path} do not exist: train them with `python -m lab.judge_mini train`.")
    judge = ClipJudge()
    try:
        judge.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise ValueError(
            f"{path} is not a judge of this version: train again with `python -m lab.judge_mini train`."
        ) from error
    return judge.eval().requires_grad_(False)


def resize_frames(frames: Tensor) -> Tensor:
    """Bring (..., 3, H, W) frames to float32 and the judge's 64x64 by area averaging."""
    frames = frames.float()
    if frames.shape[-2:] == (SIZE, SIZE):
        return frames
    flat = F.interpolate(frames.flatten(0, -4), size=(SIZE, SIZE), mode="area")
    return flat.unflatten(0, frames.shape[:-3])


@torch.inference_mode()
def verdicts(judge: ClipJudge, clips: Tensor) -> list[dict[str, str]]:
    """Name contents of (batch, CLIP_FRAMES, 3, 64, 64) clips in [0, 1]: one {attribute: name} per clip."""
    logits, _ = judge(clips.clamp(0.0, 1.0))
    chosen = {name: value.argmax(dim=1).tolist() for name, value in logits.items()}
    return [{name: ATTRIBUTES[name][rows[clip]] for name, rows in chosen.items()} for clip in range(len(clips))]


def expected_verdict(prompt: Mapping[str, Any]) -> dict[str, str]:
    """The verdict that a caption, parsed by ``parse_caption``, asks for; attributes it does not mention are absent.

    In a scene of two objects shape, colour, motion and speed are the first object's, which stands above the second.
    """
    named = {name: prompt[name] for name in ATTRIBUTES if name != "count"}
    named["count"] = "one" if prompt["second"] is None else "two"
    return {name: value for name, value in named.items() if value is not None}
