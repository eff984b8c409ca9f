"""Model families: the settings that a checkpoint does not hold, such as step list, block size and frame rate."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from longtake.configs.fields import build, choose, preset_names, read_bundled

# Wan's VAE makes four pixel frames one latent frame; the first one alone is one.
PIXELS_PER_LATENT = 4


@dataclass(frozen=True, kw_only=True)
class _CheckpointRule:
    """Location of the model in a family's released files."""

    file: str | None = None  # path inside the repository that ``homepage`` names
    # Entry of the file that holds the weights: generator_ema, generator, model; null for a file without
    key: str | None = None
    lora_file: str | None = None  # adapter that belongs on top
    lora_key: str | None = None  # entry of the adapter's file
    lora_alpha: float | None = None  # its scale times its rank; the file does not say it


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """Settings of a model family."""

    folder: str | None = None  # bundled weights inside the package; null when the user brings them
    height: int = 480  # pixels
    width: int = 832  # pixels
    fps: int = 16  # frames per second
    # ``1.3B`` or ``14B``, required of the transformer's shapes; null for shapes of its own
    size: Literal["1.3B", "14B"] | None = None
    frames_per_block: int = 3  # latent frames denoised together
    first_block_frames: int | None = None  # frames of the first block, where it differs
    sampler: Mapping[str, Any] = field(default_factory=lambda: {"name": "few_step"})  # mapping for ``make_sampler``
    context_timestep: float = 0.0  # timestep of the commit pass
    num_trained_frames: int = 21  # latent frames of the training clips
    # Policy and fields that the model was trained with, as ``make_policy`` takes them; null for full history
    cache: Mapping[str, Any] | None = None
    # Conditioning that the model takes beside text: ``image`` (one frame), ``video`` (whole blocks)
    starts: tuple[Literal["image", "video"], ...] = ("video",)
    checkpoint: _CheckpointRule = field(default_factory=_CheckpointRule)  # location of the released weights
    max_sequence_length: int = 512  # text tokens; shorter prompts are padded to it
    licence: str = ""  # of the weights
    restriction: str | None = None  # uses that the licence forbids, in a few words; printed when the model is loaded
    source: str = ""  # paper or repository
    homepage: str = ""  # address of the weights

    @property
    def bundled(self) -> Path | None:
        return None if self.folder is None else Path(str(files("longtake.models"))) / self.folder

    def num_latent_frames(self, num_pixel_frames: int, *, frames_per_block: int | None = None) -> int:
        """Latent frames of the whole blocks that hold a video of ``num_pixel_frames``."""
        block = frames_per_block or self.frames_per_block
        first = self.first_block_frames or block
        wanted = 1 + math.ceil((num_pixel_frames - 1) / PIXELS_PER_LATENT)
        return first + max(0, math.ceil((wanted - first) / block)) * block


def family_names() -> list[str]:
    """Names of the presets under ``configs/model``."""
    return preset_names("model")


def load_family(name: str) -> ModelFamily:
    """Read ``configs/model/NAME.yaml``."""
    choose(dict.fromkeys(family_names()), name, what="model family")
    return build(ModelFamily, read_bundled("model", f"{name}.yaml"), what=f"model family {name!r}")
