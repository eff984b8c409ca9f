"""Optimisers and weight averages shared by the stages of the mini model's training."""

from collections.abc import Iterable

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from lab.mini.runtime import num_workers, rank


def orthogonalise(matrix: Tensor, *, steps: int = 5) -> Tensor:
    """Return the nearest semi-orthogonal matrix, approximately, by a quintic Newton-Schulz iteration.

    Args:
        matrix: (rows, columns), any float dtype.
        steps: Iterations; five bring the singular values to about 0.7-1.2.

    Returns:
        Same shape, bfloat16.

    Source: Muon, https://kellerjordan.github.io/posts/muon/.
    """
    x = matrix.bfloat16()
    is_tall = x.shape[0] > x.shape[1]
    if is_tall:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if is_tall else x


class Muon(torch.optim.Optimizer):
    """Muon for parameters of two or more dimensions; kernels are flattened to (out, everything else).

    torch's own class takes matrices only. The update has the root-mean-square size AdamW's would have, so that
    one learning rate and weight decay serve both.

    Source: Muon is scalable for LLM training, arXiv:2502.16982.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Apply one update from the gradients, which must be equal on all workers; each orthogonalises its share."""
        for group in self.param_groups:
            params, sizes = group["params"], [p.numel() for p in group["params"]]
            updates = torch.zeros(sum(sizes), dtype=torch.bfloat16, device=params[0].device)
            for index, (parameter, update) in enumerate(zip(params, updates.split(sizes), strict=True)):
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                momentum = state["momentum"].lerp_(grad, 1.0 - group["momentum"])
                if index % num_workers() == rank():
                    direction = grad.lerp(momentum, group["momentum"]).flatten(1)
                    scale = 0.2 * max(direction.shape) ** 0.5
                    update.copy_((orthogonalise(direction) * scale).flatten())
            if num_workers() > 1:
                distributed.all_reduce(updates)
            for parameter, update in zip(params, updates.split(sizes), strict=True):
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                parameter.add_(update.view(parameter.shape).to(parameter.dtype), alpha=-group["lr"])


class OptimiserPair:
    """Muon on matrices and kernels, AdamW on the rest, under one learning-rate factor."""

    def __init__(self, muon_params: list[nn.Parameter], adamw_params: list[nn.Parameter], *, lr: tuple[float, float]):
        """Build both optimisers; ``lr`` is (Muon's, AdamW's)."""
        self.members = [
            Muon(muon_params, lr=lr[0]),
            torch.optim.AdamW(adamw_params, lr=lr[1], betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.base = lr
        self.params = [*muon_params, *adamw_params]

    def step(self, factor: float, *, clip: float = 1.0) -> float:
        """Clip the gradients, update with both learning rates times ``factor``; return the gradient norm."""
        norm = float(torch.nn.utils.clip_grad_norm_(self.params, clip))
        for member, lr in zip(self.members, self.base, strict=True):
            for group in member.param_groups:
                group["lr"] = lr * factor
            member.step()
            member.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> list[dict]:
        """Return both optimisers' states."""
        return [member.state_dict() for member in self.members]

    def load_state_dict(self, states: list[dict]) -> None:
        """Load what :meth:`state_dict` returned."""
        for member, state in zip(self.members, states, strict=True):
            member.load_state_dict(state)


class WeightAverage:
    """Exponential moving average of a module's parameters, in float32."""

    def __init__(self, module: nn.Module) -> None:
        """Start at the module's present weights."""
        self.values = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, decay: float) -> None:
        """Move towards the module's weights by ``1 - decay``."""
        live = module.state_dict()
        torch._foreach_lerp_(list(self.values.values()), [live[name] for name in self.values], 1.0 - decay)
