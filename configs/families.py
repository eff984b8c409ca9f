"""What a checkpoint does not say of itself: step list, block size, resolution, frame rate."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from omegaconf import OmegaConf

from longtake.configs.fields import build, did_you_mean


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """How a model family is run.

    Attributes:
        folder: Where the bundled weights lie inside the package; null when the user brings them.
        height: Pixels.
        width: Pixels.
        fps: Frames per second.
        frames_per_block: Latent frames denoised together.
        first_block_frames: Frames of the first block, where it differs.
        sampler: Mapping for ``make_sampler``.
        context_timestep: Timestep of the commit pass.
        num_trained_frames: Latent frames of the training clips.
        max_sequence_length: Text tokens; shorter prompts are padded to it.
        licence: Of the weights.
        source: Paper or repository.
        homepage: Where to get the weights.
    """

    folder: str | None = None
    height: int = 480
    width: int = 832
    fps: int = 16
    frames_per_block: int = 3
    first_block_frames: int | None = None
    sampler: Mapping[str, Any] = field(default_factory=lambda: {"name": "few_step"})
    context_timestep: float = 0.0
    num_trained_frames: int = 21
    max_sequence_length: int = 512
    licence: str = ""
    source: str = ""
    homepage: str = ""


def family_names() -> list[str]:
    """Names of the presets under ``configs/family``."""
    folder = files("longtake.configs") / "family"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_family(name: str) -> ModelFamily:
    """Read ``configs/family/NAME.yaml``.

    Raises:
        ValueError: If there is no such preset; names those there are.
    """
    known = family_names()
    if name not in known:
        raise ValueError(f"unknown model family {name!r}; known: {', '.join(known)}.{did_you_mean(name, known)}")
    text = (files("longtake.configs") / "family" / f"{name}.yaml").read_text(encoding="utf-8")
    return build(ModelFamily, OmegaConf.to_container(OmegaConf.create(text)), what=f"model family {name!r}")
