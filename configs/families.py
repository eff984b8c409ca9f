"""Model families: the settings that a checkpoint does not hold, such as step list, block size and frame rate."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml

from longtake.configs.fields import build, choose

# Wan's VAE makes four pixel frames one latent frame; the first one alone is one.
PIXELS_PER_LATENT = 4


@dataclass(frozen=True, kw_only=True)
class CheckpointRule:
    """Location of the model in a family's released files.

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
    """Settings of a model family.

    Attributes:
        folder: Bundled weights inside the package; null when the user brings them.
        height: Pixels.
        width: Pixels.
        fps: Frames per second.
        size: ``1.3B`` or ``14B``, required of the transformer's shapes; null for shapes of its own.
        frames_per_block: Latent frames denoised together.
        first_block_frames: Frames of the first block, where it differs.
        sampler: Mapping for ``make_sampler``.
        context_timestep: Timestep of the commit pass.
        num_trained_frames: Latent frames of the training clips.
        cache: Policy and fields that the model was trained with, as ``make_policy`` takes them; null for full history.
        starts: Conditioning that the model takes beside text: ``image`` (one frame), ``video`` (whole blocks).
        checkpoint: Location of the released weights.
        max_sequence_length: Text tokens; shorter prompts are padded to it.
        licence: Of the weights.
        restriction: Uses that the licence forbids, in a few words; printed when the model is loaded.
        source: Paper or repository.
        homepage: Address of the weights.
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

    @property
    def bundled(self) -> Path | None:
        """Folder of the weights that come with the package."""
        return None if self.folder is None else Path(str(files("longtake.models"))) / self.folder

    def num_latent_frames(self, num_pixel_frames: int, *, frames_per_block: int | None = None) -> int:
        """Latent frames of the whole blocks that hold a video of ``num_pixel_frames``."""
        block = frames_per_block or self.frames_per_block
        first = self.first_block_frames or block
        wanted = 1 + math.ceil((num_pixel_frames - 1) / PIXELS_PER_LATENT)
        return first + max(0, math.ceil((wanted - first) / block)) * block


def family_names() -> list[str]:
    """Names of the presets under ``configs/model``."""
    entries = (files("longtake.configs") / "model").iterdir()
    return sorted(entry.name.removesuffix(".yaml") for entry in entries if entry.name.endswith(".yaml"))


def load_family(name: str) -> ModelFamily:
    """Read ``configs/model/NAME.yaml``.

    Raises:
        ValueError: If there is no such preset; names those there are.
    """
    choose(dict.fromkeys(family_names()), name, what="model family")
    text = (files("longtake.configs") / "model" / f"{name}.yaml").read_text(encoding="utf-8")
    return build(ModelFamily, yaml.safe_load(text), what=f"model family {name!r}")
