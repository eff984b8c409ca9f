"""The slow, obvious version of Self-Forcing's rollout in one dtype: every rounding point is a line.

Written from the published formulas as plain tensor operations over diffusers' weight names. All weights are held in
the activation dtype; keys are rotated before they are stored, values stored as they are.
"""

import torch
from torch.nn import functional


def rms_norm(x, weight, eps):
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return normed.type_as(x) * weight


def rms_norm_rounded_once(x, weight, eps):
    """The deliberately wrong variant: torch's own order, weight before the cast."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).type_as(x)


def frame_angles(head_dim, frame, rows, columns):
    """(rows * columns, head_dim / 2) complex128 phases of one frame."""
    spatial = 2 * (head_dim // 6)
    parts = []
    for dim, values in ((head_dim - 2 * spatial, None), (spatial, "row"), (spatial, "column")):
        rates = 1.0 / torch.pow(10000.0, torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        if values is None:
            position = torch.full((rows * columns,), frame, dtype=torch.float64)
        elif values == "row":
            position = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns)
        else:
            position = torch.arange(columns, dtype=torch.float64).repeat(rows)
        angles = torch.outer(position, rates)
        parts.append(torch.polar(torch.ones_like(angles), angles))
    return torch.cat(parts, dim=1)


def rope(x, start_frame, num_frames, rows, columns):
    phases = [frame_angles(x.shape[-1], start_frame + f, rows, columns) for f in range(num_frames)]
    pairs = torch.view_as_complex(x.to(torch.float64).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.cat(phases)[:, None]).flatten(-2).type_as(x)


class UpstreamWan:
    """A causal Wan stack over a plain list of keys and values per layer."""

    def __init__(self, transformer, dtype, *, norm=rms_norm):
        self.config = transformer.config
        self.dtype = dtype
        self.norm = norm
        self.weights = {name: weight.detach().to(dtype) for name, weight in transformer.state_dict().items()}
        self.heads = self.config.num_attention_heads
        self.stored = [[] for _ in range(self.config.num_layers)]

    def linear(self, x, name):
        return functional.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def layer_norm(self, x, name=None):
        affine = (None, None) if name is None else (self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])
        return functional.layer_norm(x, x.shape[-1:], *affine, self.config.eps)

    def attention(self, q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def time(self, timesteps):
        """(batch, frames) timesteps to their embedding and its projection."""
        half = self.config.freq_dim // 2
        rates = torch.pow(10000, -torch.arange(half, dtype=torch.float64).div(half))
        sinusoid = torch.outer(timesteps.flatten().type(torch.float64), rates)
        s = torch.cat([torch.cos(sinusoid), torch.sin(sinusoid)], dim=1).to(self.dtype)
        e = self.linear(
            functional.silu(self.linear(s, self.embedder("time_embedder.linear_1"))),
            self.embedder("time_embedder.linear_2"),
        )
        e0 = self.linear(functional.silu(e), self.embedder("time_proj")).unflatten(1, (6, -1))
        return e.unflatten(0, timesteps.shape), e0.unflatten(0, timesteps.shape)

    @staticmethod
    def embedder(name):
        return f"condition_embedder.{name}"

    def text(self, embeds):
        hidden = functional.gelu(self.linear(embeds, self.embedder("text_embedder.linear_1")), approximate="tanh")
        return self.linear(hidden, self.embedder("text_embedder.linear_2"))

    def self_attention(self, x, layer, start_frame, num_frames, grid, store):
        name = f"blocks.{layer}.attn1"
        q = self.norm(self.linear(x, f"{name}.to_q"), self.weights[f"{name}.norm_q.weight"], self.config.eps)
        k = self.norm(self.linear(x, f"{name}.to_k"), self.weights[f"{name}.norm_k.weight"], self.config.eps)
        q, k, v = (t.unflatten(2, (self.heads, -1)) for t in (q, k, self.linear(x, f"{name}.to_v")))
        q, k = rope(q, start_frame, num_frames, *grid), rope(k, start_frame, num_frames, *grid)
        keys = torch.cat([*(pair[0] for pair in self.stored[layer]), k], dim=1)
        values = torch.cat([*(pair[1] for pair in self.stored[layer]), v], dim=1)
        if store:
            self.stored[layer].append((k, v))
        return self.linear(self.attention(q, keys, values), f"{name}.to_out.0")

    def cross_attention(self, x, layer, context):
        name = f"blocks.{layer}.attn2"
        q = self.norm(self.linear(x, f"{name}.to_q"), self.weights[f"{name}.norm_q.weight"], self.config.eps)
        k = self.norm(self.linear(context, f"{name}.to_k"), self.weights[f"{name}.norm_k.weight"], self.config.eps)
        q, k, v = (t.unflatten(2, (self.heads, -1)) for t in (q, k, self.linear(context, f"{name}.to_v")))
        return self.linear(self.attention(q, k, v), f"{name}.to_out.0")

    def block(self, x, layer, e0, context, **place):
        frames = e0.shape[1]
        m = (self.weights[f"blocks.{layer}.scale_shift_table"].unsqueeze(1) + e0).chunk(6, dim=2)

        def modulated(normed, shift, scale):
            return (normed.unflatten(1, (frames, -1)) * (1 + scale) + shift).flatten(1, 2)

        def gated(y, gate):
            return (y.unflatten(1, (frames, -1)) * gate).flatten(1, 2)

        y = self.self_attention(modulated(self.layer_norm(x), m[0], m[1]), layer, **place)
        x = x + gated(y, m[2])
        x = x + self.cross_attention(self.layer_norm(x, f"blocks.{layer}.norm2"), layer, context)
        hidden = self.linear(modulated(self.layer_norm(x), m[3], m[4]), f"blocks.{layer}.ffn.net.0.proj")
        y = self.linear(functional.gelu(hidden, approximate="tanh"), f"blocks.{layer}.ffn.net.2")
        return x + gated(y, m[5])

    @torch.no_grad()
    def flow(self, x, timesteps, embeds, *, start_frame, store=False):
        """Flow of (batch, frames, channels, height, width); timesteps (batch, frames or 1)."""
        _, patch_height, patch_width = self.config.patch_size
        grid = x.shape[3] // patch_height, x.shape[4] // patch_width
        weight, bias = self.weights["patch_embedding.weight"], self.weights["patch_embedding.bias"]
        tokens = functional.conv3d(x.to(self.dtype).transpose(1, 2), weight, bias, stride=self.config.patch_size)
        tokens = tokens.flatten(2).transpose(1, 2)
        e, e0 = self.time(timesteps)
        context = self.text(embeds.to(self.dtype))
        place = {"start_frame": start_frame, "num_frames": x.shape[1], "grid": grid, "store": store}
        for layer in range(self.config.num_layers):
            tokens = self.block(tokens, layer, e0, context, **place)
        h = (self.weights["scale_shift_table"].unsqueeze(1) + e.unsqueeze(2)).chunk(2, dim=2)
        normed = self.layer_norm(tokens).unflatten(1, (e.shape[1], -1))
        out = self.linear((normed * (1 + h[1]) + h[0]).flatten(1, 2), "proj_out")
        out = out.unflatten(1, (x.shape[1], *grid)).unflatten(-1, (patch_height, patch_width, -1))
        return out.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)

    def rollout(self, embeds, noise, renoise, *, sigmas, block, context_timestep=0.0):
        """Blocks of clean latents; noise (batch, frames, ...), renoise (batch, frames, steps - 1, ...), any dtype."""
        done = []
        sigmas = torch.tensor(sigmas, dtype=torch.float64).float()
        for start in range(0, noise.shape[1], block):
            frames = slice(start, start + block)
            x = noise[:, frames].to(self.dtype)
            for step, sigma in enumerate(sigmas):
                timesteps = (sigma * 1000).expand(x.shape[0], block)
                flow = self.flow(x, timesteps, embeds, start_frame=start)
                x0 = (x.double() - sigma.double() * flow.double()).to(self.dtype)
                if step + 1 < len(sigmas):
                    following = sigmas[step + 1].reshape(1, 1, 1, 1, 1)  # a tensor, so that products are float32
                    fresh = renoise[:, frames, step].to(self.dtype)
                    x = ((1 - following) * x0 + following * fresh).type_as(fresh)
            done.append(x0)
            committed = torch.full((x.shape[0], block), context_timestep)
            self.flow(x0, committed, embeds, start_frame=start, store=True)
        return torch.cat(done, dim=1)
