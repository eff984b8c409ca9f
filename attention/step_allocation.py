"""Heterogeneous step allocation: tokens that change little are denoised in fewer steps, and attended to from a cache.

A reconstruction: the abstract of "Not All Tokens Need 40 Steps" (arXiv:2605.06892) says that budgets follow velocity
dynamics, that active tokens attend to cached keys and values of the others, and that skipped tokens move on by one
cached Euler step. How tokens are ranked and strides are shared out is ours. For bidirectional models in many steps
with an Euler sampler: four-step causal models have no steps to spare, and multistep samplers mix velocities of other
steps.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def relative_change(velocity: Tensor, before: Tensor, eps: float = 1e-6) -> Tensor:
    """Change of the velocity of each token in one step, relative to what it was.

    Args:
        velocity: (batch, tokens, channels).
        before: (batch, tokens, channels), one step earlier.
        eps: Keeps tokens at rest finite.

    Returns:
        (tokens,), float32, the mean over the batch: one allocation serves all its samples.
    """
    velocity, before = velocity.float(), before.float()
    change = (velocity - before).abs().sum(-1) / (before.abs().sum(-1) + eps)
    return change.mean(0)


@dataclass(frozen=True, kw_only=True)
class StepAllocation:
    """Schedule of the steps in which each token is computed.

    All tokens are computed in the first steps and in the last one; in between a token of stride s in every s-th.
    """

    target: float = 0.5  # share of the token steps of a plain run that is computed
    num_warmup_steps: int = 4  # full steps at the beginning; the last two say how fast tokens change
    strides: tuple[int, ...] = (1, 2, 4, 8)  # ascending; tokens that change most have the first

    def __post_init__(self) -> None:
        if not 0 < self.target <= 1:
            raise ValueError(f"target={self.target} must be above 0 and at most 1.")
        if self.num_warmup_steps < 2:
            raise ValueError(
                f"num_warmup_steps={self.num_warmup_steps} must be 2 or more: a change takes two velocities."
            )
        if not self.strides or self.strides[0] < 1 or list(self.strides) != sorted(set(self.strides)):
            raise ValueError(f"strides={list(self.strides)} must ascend from 1 or more, each once.")

    def shares(self, num_steps: int) -> tuple[float, ...]:
        """Share of the tokens that each stride gets, so that ``target`` is met: a geometric series.

        Args:
            num_steps: Steps of the run.

        Raises:
            ValueError: If even the largest stride computes more, or there are no steps after the warm-up.
        """
        if num_steps <= self.num_warmup_steps:
            raise ValueError(f"num_warmup_steps={self.num_warmup_steps} leaves none of {num_steps} steps: use fewer.")
        computed = [self._num_active_steps(stride, num_steps) / num_steps for stride in self.strides]
        if not min(computed) <= self.target <= max(computed):
            raise ValueError(
                f"target={self.target} cannot be met in {num_steps} steps, "
                f"only {min(computed):.3f} to {max(computed):.3f}: change strides or num_warmup_steps."
            )
        low, high = -60.0, 60.0
        for _ in range(100):
            slope = (low + high) / 2
            mean = sum(w * c for w, c in zip(self._series(slope), computed, strict=True))
            low, high = (slope, high) if mean < self.target else (low, slope)
        return self._series(high)

    def assign(self, change: Tensor, num_steps: int) -> Tensor:
        """Give every token its stride.

        Args:
            change: (tokens,), of ``relative_change``.
            num_steps: Steps of the run.

        Returns:
            (tokens,), int64.
        """
        ends = torch.tensor(self.shares(num_steps), dtype=torch.float64).cumsum(0) * len(change)
        rank = torch.empty_like(change, dtype=torch.long)
        rank[change.argsort(descending=True, stable=True)] = torch.arange(len(change), device=change.device)
        group = torch.searchsorted(ends.round().long().to(change.device), rank, right=True)
        strides = torch.tensor(self.strides, device=change.device)
        return strides[group.clamp(max=len(self.strides) - 1)]

    def active(self, strides: Tensor, step: int, num_steps: int) -> Tensor | None:
        """Tokens that a step computes.

        Args:
            strides: (tokens,), of ``assign``.
            step: From 0, after the warm-up.
            num_steps: Steps of the run.

        Returns:
            Their numbers, ascending, int64; None: all.
        """
        if step == num_steps - 1:
            return None
        is_active = (step - self.num_warmup_steps) % strides == 0
        return None if bool(is_active.all()) else is_active.nonzero()[:, 0]

    def _num_active_steps(self, stride: int, num_steps: int) -> int:
        rest = range(self.num_warmup_steps, num_steps)
        return self.num_warmup_steps + sum(
            (step - self.num_warmup_steps) % stride == 0 or step == num_steps - 1 for step in rest
        )

    def _series(self, slope: float) -> tuple[float, ...]:
        """Shares that sum to one; the larger the slope, the more tokens have small strides."""
        logs = [-slope * index for index in range(len(self.strides))]
        weights = [math.exp(value - max(logs)) for value in logs]
        return tuple(weight / sum(weights) for weight in weights)


class TokenCache:
    """Keys and values of all tokens in every layer, those of skipped tokens as they last were.

    One for each branch of classifier-free guidance and each video. It holds two tensors of the whole sequence per
    layer: 5.6 GiB for Wan2.1 1.3B at 32,760 tokens in bfloat16, 25 GiB for 14B.
    """

    def __init__(self) -> None:
        self._stored: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, layer: int, k: Tensor, v: Tensor, active: Tensor | None) -> tuple[Tensor, Tensor]:
        """Take over what active tokens have computed.

        Args:
            layer: Self-attention layer.
            k: (batch, active tokens, heads, head_dim), rotated to the tokens' own places.
            v: Same shape.
            active: (active tokens,), int64; None: all.

        Returns:
            Keys and values of all tokens, to be read before the next update.

        Raises:
            ValueError: If the layer has not been computed for all tokens yet.
        """
        if active is None:
            self._stored[layer] = (k.clone(), v.clone())
        elif layer not in self._stored:
            raise ValueError(f"layer {layer} has no keys of the tokens that are skipped: compute all tokens first.")
        else:
            for stored, new in zip(self._stored[layer], (k, v), strict=True):
                stored[:, active] = new
        return self._stored[layer]
