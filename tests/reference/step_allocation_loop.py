"""The loop of heterogeneous step allocation written out, over any velocity."""

import torch

from longtake.models.bidirectional import _relative_change


def denoise(velocity, x, sigmas, *, allocation):
    """Integrate a flow with Euler steps, each token in as many as it is allotted; the state, the share computed."""
    num_steps = len(sigmas) - 1
    allocation.shares(num_steps)
    x = x.clone()
    at = torch.full((x.shape[1], 1), float(sigmas[0]), dtype=torch.float32, device=x.device)
    last = None
    strides = None
    num_computed = 0
    for step, sigma in enumerate(sigmas[:-1]):
        active = None if strides is None else allocation.active(strides, step, num_steps)
        chosen = slice(None) if active is None else active
        if last is not None:
            # However many steps a token has skipped, it catches up in one.
            x[:, chosen] += ((sigma - at[chosen]) * last[:, chosen]).to(x.dtype)
            at[chosen] = sigma
        new = velocity(x, float(sigma), active)
        num_computed += new.shape[1]
        if step == allocation.num_warmup_steps - 1:
            strides = allocation.assign(_relative_change(new, last), num_steps)
        if last is None:
            last = new.clone()
        else:
            last[:, chosen] = new
    # The last step computes all tokens, so all are at its sigma.
    x += ((sigmas[-1] - at) * last).to(x.dtype)
    return x, num_computed / (num_steps * x.shape[1])
