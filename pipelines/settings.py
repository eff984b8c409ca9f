"""Settings of rollouts and videos: everything a user passes by keyword, validated once and before any forward."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args

from torch import Tensor

from longtake.attention import BackendUnavailable, SparsePolicy
from longtake.attention.policies import POLICIES as SPARSE_POLICIES
from longtake.cache import EXACT_POLICY, POLICIES, CachePolicy, Event, Traits, make_policy
from longtake.models.numerics import Numerics, check_numerics
from longtake.models.sparse_attention import AttentionSetting
from longtake.pipelines.conditioning import ConditioningLatents
from longtake.samplers import SAMPLERS, Sampler, make_sampler

_Function = TypeVar("_Function", bound=Callable[..., Any])

EVENTS: tuple[Event, ...] = get_args(Event)  # from the weakest to the strongest

_Schedule = Sequence[tuple[float, str | Sequence[str]] | tuple[float, str | Sequence[str], Event]]
"""(seconds, prompt) or (seconds, prompt, event) of later prompts, in order of time."""


def takes_fields_of(schema: type) -> Callable[[_Function], _Function]:
    """Show the fields of a dataclass, which a function takes as ``**settings``, in ``help`` and in notebooks."""

    def decorate(function: _Function) -> _Function:
        signature, fields = inspect.signature(function), inspect.signature(schema).parameters
        own = {p.name: p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD}
        parameters = [*own.values(), *(p for name, p in fields.items() if name not in own)]
        vars(function)["__signature__"] = signature.replace(parameters=parameters)
        return function

    return decorate


@dataclass(frozen=True)
class PromptSwitch:
    """A change of prompt."""

    start_frame: int  # it takes effect at the first block that starts here or later
    prompt_embeds: Tensor  # (batch, text_len, text_dim)
    event: Event = "keep"  # effect on the cache; at the very first block there is nothing to act on


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """Settings of a rollout of latents; validated when made, without any weight.

    Raises:
        ValueError: For settings that are unknown or do not fit each other, with the limit and the remedy.
    """

    num_frames: int = 21  # latent frames to generate, beyond the conditioning latents; whole blocks
    frame_shape: Sequence[int] = (16, 60, 104)  # (channels, height, width) of a latent frame
    frames_per_block: int = 3  # latent frames denoised together
    first_block_frames: int | None = None  # frames of the very first block, where it differs (1 in frame-first models)
    # Policy, its mapping, or its name; the policy afterwards is ``policy``.
    cache: CachePolicy | Mapping[str, Any] | str = EXACT_POLICY
    # Sampler, its mapping, or its name; the sampler afterwards is ``solver``.
    sampler: Sampler | Mapping[str, Any] | str = "few_step"
    context_timestep: float = 0.0  # timestep of the commit pass; no noise is added
    # Attention policy, its mapping (``backend`` may name a backend), or its name.
    attention: AttentionSetting | SparsePolicy | Mapping[str, Any] | str = "dense"
    # ``native``, or ``upstream``: half precision is rounded where Self-Forcing's code rounds it.
    numerics: Numerics = "native"
    # Whether a block's commit shares one forward with the next block's first denoising pass; None leaves it to the
    # number of tokens.
    merge_commit: bool | None = None
    policy: CachePolicy = field(init=False)
    solver: Sampler = field(init=False)
    sparsity: AttentionSetting = field(init=False)

    def __post_init__(self) -> None:
        for name, value in (("num_frames", self.num_frames), ("frames_per_block", self.frames_per_block)):
            if value < 1:
                raise ValueError(f"{name}={value} must be 1 or more.")
        if self.first_block_frames is not None and self.first_block_frames < 1:
            raise ValueError(f"first_block_frames={self.first_block_frames} must be 1 or more, or None.")
        sparsity = self.attention if isinstance(self.attention, AttentionSetting) else AttentionSetting(self.attention)
        made = {"policy": make_policy(self.cache), "solver": make_sampler(self.sampler), "sparsity": sparsity}
        for name, value in (made | {"frame_shape": tuple(self.frame_shape)}).items():
            object.__setattr__(self, name, value)
        self._check_sampler()
        _check_attention(self.policy, self.sparsity)
        check_numerics(self.numerics)
        if self.numerics == "upstream" and not self.solver.is_renoising:
            known = [name for name, kind in SAMPLERS.items() if kind.is_renoising]
            raise ValueError(
                f"numerics='upstream' rounds between the steps as the published re-noising loop does, which sampler "
                f"{self.solver.name!r} is not: use numerics 'native', or one of the samplers {', '.join(known)}."
            )

    def _check_sampler(self) -> None:
        if self.solver.num_window_blocks > 1 and not self.policy.traits.takes_windows:
            # A wrapper's traits depend on its inner policy.
            kinds = {name: kind.traits for name, kind in POLICIES.items() if isinstance(kind.traits, Traits)}
            known = [name for name, traits in kinds.items() if traits.takes_windows]
            raise ValueError(
                f"cache policy {self.policy.name!r} serves one block at a time, sampler {self.solver.name!r} denoises "
                f"{self.solver.num_window_blocks} together: use another sampler, or one of the policies "
                f"{', '.join(known)}."
            )

    @property
    def num_first_frames(self) -> int:
        return self.first_block_frames or self.frames_per_block

    @property
    def num_joint_frames(self) -> int:
        """Most latent frames that are denoised together."""
        rest = (self.solver.num_window_blocks - 1) * self.frames_per_block
        return max(self.num_first_frames, self.frames_per_block) + rest

    def check_length(self, *, num_given: int = 0) -> None:
        """Refuse lengths that are no whole blocks, or that the policy cannot hold.

        Args:
            num_given: Conditioning latents, in frames.
        """
        first, block = self.num_first_frames, self.frames_per_block
        if num_given and (num_given < first or (num_given - first) % block):
            raise ValueError(
                f"initial_latents has {num_given} frames, which is no whole number of blocks: "
                f"use {first} frames plus a multiple of {block}."
            )
        total = num_given + self.num_frames
        if total < first or (total - first) % block:
            nearest = first + max(0, round((total - first) / block)) * block
            raise ValueError(
                f"num_frames={self.num_frames} is no whole number of blocks of {block} frames "
                f"(first block {first}, {num_given} given): use {max(nearest - num_given, block)}."
            )
        self.policy.check(self.num_joint_frames, total)

    def check_backend(self) -> None:
        """Raise a ``ValueError`` if a named attention backend cannot run on this machine."""
        try:
            self.sparsity.check_backend()
        except BackendUnavailable as error:
            raise ValueError(str(error)) from error

    def check_event(self, event: str) -> None:
        """Raise a ``ValueError`` for an event that does not exist, or that policy or sampler cannot serve."""
        if event not in EVENTS:
            raise ValueError(f"unknown prompt event {event!r}; known: {', '.join(EVENTS)}.")
        if event not in self.policy.events and event != "keep":
            known = [n for n, kind in POLICIES.items() if isinstance(kind.events, frozenset) and event in kind.events]
            others = f", or a policy that does: {', '.join(known)}" if known else ""
            own = ", ".join(repr(name) for name in EVENTS if name == "keep" or name in self.policy.events)
            raise ValueError(
                f"cache policy {self.policy.name!r} does not support the prompt event {event!r}: use {own}{others}."
            )
        if event != "keep" and self.solver.num_window_blocks > 1:
            raise ValueError(
                f"sampler {self.solver.name!r} denoises blocks of both prompts together, so there is no moment for "
                f"the prompt event {event!r}: use 'keep', or another sampler."
            )


def _check_attention(policy: CachePolicy, attention: AttentionSetting) -> None:
    """Refuse sparse attention over a cache that weights its tokens, breaks frames or gives heads different ones."""
    if attention.is_dense:
        return
    if policy.traits.weighs_tokens:
        raise ValueError(
            f"cache policy {policy.name!r} weights its tokens with these settings, which attention "
            f"{attention.policy.name!r} does not take: use attention 'dense', or another cache policy."
        )
    if policy.traits.splits_heads and not attention.policy.is_static:
        raise ValueError(
            f"cache policy {policy.name!r} gives heads different tokens, and attention {attention.policy.name!r} "
            "chooses by the tokens of all heads: use one that looks at positions alone, such as 'radial'."
        )
    if policy.traits.breaks_frames and attention.policy.needs_frames:
        known = [name for name, kind in SPARSE_POLICIES.items() if not kind.needs_frames]
        raise ValueError(
            f"cache policy {policy.name!r} reads tokens that are no whole frames with these settings, which attention "
            f"{attention.policy.name!r} has no place for: use another cache policy, or one of {', '.join(known)}."
        )


@dataclass(frozen=True, kw_only=True)
class VideoSettings:
    """Settings of one video, as ``LongVideoPipeline``'s ``start``, ``stream`` and call take them by keyword."""

    negative_prompt: str | Sequence[str] | None = None  # used by samplers with guidance
    seconds: float | None = None  # length; or give ``num_frames``. Rounded up to 1 + 4 k pixel frames.
    num_frames: int | None = None  # length in pixel frames
    height: int | None = None  # pixels; the family's unless given
    width: int | None = None  # pixels
    # Policy, its mapping, or its name; the one that the family was trained with unless given, else the default one.
    cache: CachePolicy | Mapping[str, Any] | str | None = None
    # Sampler, its mapping, or its name; the family's unless given.
    sampler: Sampler | Mapping[str, Any] | str | None = None
    # One for all samples, or one per sample. A sample's video depends on its own prompt and seed alone.
    seed: int | Sequence[int] = 0
    guidance_scale: float | None = None  # overrides the sampler's
    num_inference_steps: int | None = None  # overrides a multi-step sampler's
    # (batch, channels, latent frames, height, width) noise to start from instead of the seed's.
    latents: Tensor | None = None
    prompt_embeds: Tensor | None = None  # (batch, text_len, text_dim) instead of ``prompt``
    negative_prompt_embeds: Tensor | None = None  # same shape, instead of ``negative_prompt``
    frames_per_block: int | None = None  # overrides the family's
    # Later prompts, in order of time: (seconds, prompt) or (seconds, prompt, event), from the first block on that
    # starts at or after that time; event: keep, recache, flush, cut, as far as the policy knows it.
    schedule: _Schedule = ()
    # Attention policy, its mapping (``backend`` may name a backend), or its name.
    attention: SparsePolicy | Mapping[str, Any] | str = "dense"
    decode: bool = True  # whether blocks carry pixels
    image: Any = None  # continue an image, or one per sample, with models that start from one; see ``make_stills``
    # Continue the end of a video, or of one per sample: a path, PIL images, an array or a tensor; see ``make_clips``.
    # It fills the cache under the policy; time, seeds and lengths count from its end.
    video: Any = None
    # Continue latents: (batch, channels, latent frames, height, width), normalised.
    video_latents: Tensor | ConditioningLatents | None = None
    # Whether the conditioning frames come out too, as the VAE decodes them, before the rest.
    include_start: bool = True

    def __post_init__(self) -> None:
        if self.seconds is not None and self.num_frames is not None:
            raise ValueError(f"seconds={self.seconds} and num_frames={self.num_frames}: give one of the two.")
        if self.seconds is not None and not (self.seconds > 0 and math.isfinite(self.seconds)):
            raise ValueError(f"seconds={self.seconds} must be a number above 0.")
        if self.num_frames is not None and self.num_frames < 1:
            raise ValueError(f"num_frames={self.num_frames} must be 1 or more.")

    def prompts(self, prompt: str | Sequence[str] | None) -> list[str]:
        """The texts, one per sample; empty ones where embeddings are given."""
        if (prompt is None) == (self.prompt_embeds is None):
            raise ValueError("give either prompt or prompt_embeds.")
        if prompt is None and self.prompt_embeds is not None:
            return [""] * self.prompt_embeds.shape[0]
        texts = [prompt] if isinstance(prompt, str) else list(prompt or [])
        if not texts:
            raise ValueError("the list of prompts is empty.")
        return texts

    def seeds(self, batch_size: int) -> list[int]:
        """One seed per sample."""
        seeds = [self.seed] * batch_size if isinstance(self.seed, int) else list(self.seed)
        if len(seeds) != batch_size:
            raise ValueError(f"{len(seeds)} seeds for {batch_size} prompts: give one seed, or one per prompt.")
        return seeds

    def negatives(self, batch_size: int) -> list[str]:
        """Negative prompts, one per sample; empty ones unless given."""
        given = [self.negative_prompt] if isinstance(self.negative_prompt, str) else list(self.negative_prompt or [""])
        return given * batch_size if len(given) == 1 else given

    def solver(self, default: Mapping[str, Any]) -> Sampler:
        """The sampler, or the family's (``default``), with the guidance and steps that override its own."""
        sampler = make_sampler(default if self.sampler is None else self.sampler)
        changes = {"guidance_scale": self.guidance_scale, "num_inference_steps": self.num_inference_steps}
        changes = {name: value for name, value in changes.items() if value is not None}
        return make_sampler(sampler.settings() | changes) if changes else sampler
