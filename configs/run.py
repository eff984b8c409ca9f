"""Configuration of one run: frozen, validated dataclasses with the keys of its YAML file."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from longtake.configs.families import load_family

# Wan's VAE makes 8x8 pixels one latent position, the transformer makes 2x2 of these one token.
SIZE_MULTIPLE = 16
# Wan's text encoder reads 512 tokens, and a word has at least one.
MAX_PROMPT_WORDS = 512
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Weights, and the way they run."""

    family: str = "mini"  # preset under ``configs/model``: step list, block size, resolution, frame rate
    path: str | None = None  # diffusers folder; None for the family's bundled weights
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of weights and activations
    device: str = "auto"  # ``auto`` takes CUDA where there is one; or ``cpu``, ``cuda``, ``cuda:1``
    any_size: bool = False  # take a transformer of another size than the family's; so is a folder that is named alone
    free_text_encoder: bool = False  # drop the text encoder once all prompts are encoded
    vae_tiling: bool = False  # decode in overlapping tiles; whatever tile is not in work rests in host memory
    # Where weights wait for their turn: ``none`` keeps them on the device, ``model`` brings one component at a time,
    # ``sequential`` one layer
    offload: Literal["none", "model", "sequential"] = "none"
    # ``upstream`` rounds half precision where the published code of Self-Forcing does
    numerics: Literal["native", "upstream"] = "native"
    fast_vae: str | None = None  # file of a small decoder (TAEHV) that makes the pixels in place of the VAE

    def __post_init__(self) -> None:
        family = load_family(self.family)
        if self.path is None and family.folder is None:
            raise ValueError(
                f"model family {self.family!r} has no bundled weights: get them ({family.homepage}) as a diffusers "
                f"folder and give --model {self.family}=FOLDER, or model.path=FOLDER"
            )


@dataclass(frozen=True, kw_only=True)
class _OutputConfig:
    folder: str | None = None  # run folder; None makes one under ``runs``
    crf: int = 18  # H.264 quality: 0 (lossless) to 51
    scale: int = 1  # whole-number enlargement of the pixels in the file
    state_every_blocks: int = 10  # blocks between two saved states: what a killed run computes again, at most
    num_kept_states: int = 8  # saved states to fork from, spread over the video; the newest always stays
    contact_sheet: bool = False  # also write ``contact_sheet.png``

    def __post_init__(self) -> None:
        if not 0 <= self.crf <= 51:
            raise ValueError(f"output.crf={self.crf}: give 0 (lossless) to 51 (smallest)")
        for name, value, least in (
            ("scale", self.scale, 1),
            ("state_every_blocks", self.state_every_blocks, 1),
            ("num_kept_states", self.num_kept_states, 2),
        ):
            if value < least:
                raise ValueError(f"output.{name}={value}: give {least} or more")


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """An image or a clip that the video continues; all times and lengths of a run count from its end."""

    image: str | None = None  # image file; for models that start from one
    video: str | None = None  # video file
    seconds: float | None = None  # go on from the last so many seconds of the video; None: from all of it
    include: bool = True  # whether the file begins with what it goes on from, as the VAE decodes it

    def __post_init__(self) -> None:
        if (self.image is None) == (self.video is None):
            given = "both an image and a video" if self.image is not None else "neither an image nor a video"
            raise ValueError(f"start: {given} to go on from: give one of image and video")
        if self.seconds is not None and self.image is not None:
            raise ValueError(f"start: seconds={self.seconds:g} is for videos: an image has no length")
        if self.seconds is not None and not (math.isfinite(self.seconds) and self.seconds > 0):
            raise ValueError(f"start: seconds={self.seconds}: give a length above 0")
        # Absolute, so that a run is resumed from anywhere.
        object.__setattr__(self, self.kind, str(Path(self.path).absolute()))

    @property
    def kind(self) -> Literal["image", "video"]:
        return "video" if self.image is None else "image"

    @property
    def path(self) -> str:
        return self.image or self.video or ""


@dataclass(frozen=True, kw_only=True)
class PromptChange:
    """A new prompt from the first block on that starts at or after ``at`` seconds."""

    at: float  # seconds
    prompt: str  # what to show from there on
    # What happens to the cache; which ones there are is up to the policy
    event: Literal["keep", "recache", "flush", "cut"] = "keep"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.at) and self.at > 0):
            raise ValueError(f"prompt_changes: at={self.at}: give a time in seconds above 0")
        check_prompt(self.prompt)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a video."""

    model: ModelConfig  # weights
    cache: Mapping[str, Any]  # ``policy`` and its fields, as ``longtake.cache.make_policy`` takes them
    sampler: Mapping[str, Any]  # ``name`` and its fields, as ``longtake.samplers.make_sampler`` takes them
    prompt: str  # what to show
    negative_prompt: str | None = None  # what not to show; for samplers with guidance
    start: StartConfig | None = None  # what it goes on from; None: from the prompt alone
    seconds: float = 60.0  # length of what is made, the start not counted
    seed: int = 0  # of the noise
    height: int | None = None  # pixels; None leaves it to the model
    width: int | None = None  # pixels; None leaves it to the model
    prompt_changes: tuple[PromptChange, ...] = ()  # later prompts, in order of time
    # ``policy`` and its fields, as ``longtake.attention.make_attention_policy`` takes them, and ``backend``
    attention: Mapping[str, Any] = field(default_factory=lambda: {"policy": "dense"})
    output: _OutputConfig = field(default_factory=_OutputConfig)  # files

    def __post_init__(self) -> None:
        check_prompt(self.prompt)
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            raise ValueError(f"seconds={self.seconds}: give a length above 0")
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed={self.seed}: give 0 to {MAX_SEED}")
        _check_size("height", self.height)
        _check_size("width", self.width)
        times = [change.at for change in self.prompt_changes]
        if times != sorted(set(times)):
            raise ValueError(f"prompt_changes at {times}: give rising, different times")

    def as_mapping(self) -> dict[str, Any]:
        """Return plain dicts, lists and numbers that load into an equal configuration."""
        values = asdict(self)
        values["prompt_changes"] = list(values["prompt_changes"])
        return values


def check_prompt(prompt: str) -> None:
    """Refuse a prompt that no text encoder reads as it is meant.

    Args:
        prompt: The text.
    """
    num_words = len(prompt.split())
    if num_words == 0:
        raise ValueError("the prompt is empty: say what the video shows")
    if num_words > MAX_PROMPT_WORDS:
        raise ValueError(
            f"the prompt has {num_words} words, the text encoder reads {MAX_PROMPT_WORDS} tokens at most: shorten it"
        )


def _check_size(name: str, value: int | None) -> None:
    if value is not None and (value <= 0 or value % SIZE_MULTIPLE):
        nearest = max(SIZE_MULTIPLE, round(value / SIZE_MULTIPLE) * SIZE_MULTIPLE)
        raise ValueError(f"{name}={value} is not a positive multiple of {SIZE_MULTIPLE}: use {nearest}")
