"""What a checkpoint does not say of itself: step list, block size, resolution, frame rate."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, Literal

from omegaconf import OmegaConf

from longtake.configs.fields import build, did_you_mean

# Wan's VAE makes four pixel frames one latent frame; the first one alone is one.
PIXELS_PER_LATENT = 4


@dataclass(frozen=True, kw_only=True)
class CheckpointRule:
    """What a family's released files hold and which part is the model.

    Attributes:
        file: Path inside the repository that ``homepage`` names.
        key: Entry of the file that holds the weights: generator_ema, generator, model; null for a file without.
        lora_file: Adapter that belongs on top.
        lora_key: Entry of the adapter's file.
        lora_alpha: Its scale times its rank; the file does not say it.
    """

    file: str | None = None
    key: str | None = None
    lora_file: str | None = None
    lora_key: str | None = None
    lora_alpha: float | None = None


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """How a model family is run.

    Attributes:
        folder: Where the bundled weights lie inside the package; null when the user brings them.
        height: Pixels.
        width: Pixels.
        fps: Frames per second.
        size: ``1.3B`` or ``14B``: what the transformer's shapes have to be; null for shapes of its own.
        frames_per_block: Latent frames denoised together.
        first_block_frames: Frames of the first block, where it differs.
        sampler: Mapping for ``make_sampler``.
        context_timestep: Timestep of the commit pass.
        num_trained_frames: Latent frames of the training clips.
        cache: Policy and fields that the model was trained with, as ``make_policy`` takes them; null for full history.
        starts: What a video may begin from beside text: ``image`` (one frame), ``video`` (whole blocks).
        checkpoint: Where the released file lies and what in it is meant.
        max_sequence_length: Text tokens; shorter prompts are padded to it.
        licence: Of the weights.
        restriction: What the licence forbids, in a few words; told when the model is loaded.
        source: Paper or repository.
        homepage: Where to get the weights.
    """

    folder: str | None = None
    height: int = 480
    width: int = 832
    fps: int = 16
    size: Literal["1.3B", "14B"] | None = None
    frames_per_block: int = 3
    first_block_frames: int | None = None
    sampler: Mapping[str, Any] = field(default_factory=lambda: {"name": "few_step"})
    context_timestep: float = 0.0
    num_trained_frames: int = 21
    cache: Mapping[str, Any] | None = None
    starts: tuple[Literal["image", "video"], ...] = ("video",)
    checkpoint: CheckpointRule = field(default_factory=CheckpointRule)
    max_sequence_length: int = 512
    licence: str = ""
    restriction: str | None = None
    source: str = ""
    homepage: str = ""

    def num_latent_frames(self, num_pixel_frames: int, *, frames_per_block: int | None = None) -> int:
        """Latent frames of a video: whole blocks that hold it.

        Args:
            num_pixel_frames: Its length.
            frames_per_block: Where it is not the family's.
        """
        block = frames_per_block or self.frames_per_block
        first = self.first_block_frames or block
        wanted = 1 + math.ceil((num_pixel_frames - 1) / PIXELS_PER_LATENT)
        return first + max(0, math.ceil((wanted - first) / block)) * block


def family_names() -> list[str]:
    """Names of the presets under ``configs/model``."""
    folder = files("longtake.configs") / "model"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_family(name: str) -> ModelFamily:
    """Read ``configs/model/NAME.yaml``.

    Raises:
        ValueError: If there is no such preset; names those there are.
    """
    known = family_names()
    if name not in known:
        raise ValueError(f"unknown model family {name!r}; known: {', '.join(known)}.{did_you_mean(name, known)}")
    text = (files("longtake.configs") / "model" / f"{name}.yaml").read_text(encoding="utf-8")
    what = f"model family {name!r}"
    values = OmegaConf.to_container(OmegaConf.create(text))
    rule = build(CheckpointRule, values.pop("checkpoint", {}), what=f"checkpoint of {what}")
    return build(ModelFamily, values | {"checkpoint": rule}, what=what)
