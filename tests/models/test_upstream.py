"""Upstream numerics equal a plain restatement of the published code bit for bit; native ones do not, and need not."""

import copy

import pytest
import torch
import upstream_wan as reference

from longtake.attention import sdpa
from longtake.cache import KVCache, Pass, make_policy
from longtake.models import CausalTransformer, Prompt, Segment, causal
from longtake.pipelines import LatentRollout, rollout_latents

SHAPE = (4, 6, 4)
SIGMAS = (1.0, 0.9375, 2.5 / 3, 0.625)


class RecordedNoise:
    """The same noise for both."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.noise = torch.randn(2, 9, *SHAPE, generator=generator)
        self.after = torch.randn(2, 9, 3, *SHAPE, generator=generator)
        self.embeds = torch.randn(2, 7, 16, generator=generator)

    def initial(self, block_index, start_frame, shape):
        return self.noise[:, start_frame : start_frame + shape[1]]

    def renoise(self, block_index, start_frame, step_index, shape):
        return self.after[:, start_frame : start_frame + shape[1], step_index]


NOISE = RecordedNoise()


@pytest.fixture
def build(make_transformer):
    """Makes a float32 transformer, and one whose weights are loaded as diffusers loads them in ``dtype``."""

    def make(head_dim=24, dtype=torch.bfloat16):
        model = make_transformer(attention_head_dim=head_dim)
        for name, weight in model.named_parameters():
            if "norm" in name:  # as made they are ones, and the order of cast and product would not show
                weight.data = torch.randn_like(weight) * 0.3 + 1
        loaded = copy.deepcopy(model)
        for name, weight in loaded.named_parameters():
            if not set(name.split(".")) & set(loaded._keep_in_fp32_modules):
                weight.data = weight.data.to(dtype)
        return model, loaded

    return make


@pytest.fixture(autouse=True)
def one_attention(monkeypatch):
    """The same kernel on both sides, whatever this machine has."""
    monkeypatch.setattr(causal, "fastest", lambda *_: sdpa)


def roll(model, numerics, *, merge=False, **settings):
    settings = {"num_frames": 9, "frame_shape": SHAPE, "cache": "full", "noise": NOISE} | settings
    rollout = rollout_latents(model, NOISE.embeds, merge_commit=merge, numerics=numerics, **settings)
    return torch.cat([block.latents for block in rollout], dim=1)


def expected(model, dtype, **variant):
    stack = reference.UpstreamWan(model, dtype, **variant)
    return stack.rollout(NOISE.embeds, NOISE.noise, NOISE.after, sigmas=SIGMAS, block=3)


@pytest.mark.parametrize("head_dim", [24, 128])
def test_bfloat16_rollout_is_the_published_one_bit_for_bit(build, head_dim):
    model, loaded = build(head_dim)
    right = expected(model, torch.bfloat16)
    for merge in (False, True):
        ours = roll(loaded, "upstream", merge=merge)
        assert ours.dtype == torch.bfloat16 and torch.equal(ours, right), merge
    native = roll(loaded, "native")
    assert native.dtype == torch.float32 and (native - right.float()).abs().mean() > 1e-3
    wrong = expected(model, torch.bfloat16, norm=reference.rms_norm_rounded_once)
    assert not torch.equal(wrong, right), "one rounding point elsewhere must show"


def test_float32_rollouts_agree(build):
    model, _ = build()
    native, upstream = roll(model, "native"), roll(model, "upstream")
    assert upstream.dtype == torch.float32
    assert (native - upstream).abs().max() < 1e-5
    assert (upstream - expected(model, torch.float32)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_timestep_per_frame(build, dtype):
    """As rolling-window sampling asks for: segments and parts of segments at timesteps of their own."""
    model, loaded = build(dtype=dtype)
    stack = reference.UpstreamWan(model, dtype)
    x, timesteps = NOISE.noise[:, :6].to(dtype), (937.5, 833.3, 625.0)
    stack.flow(x[:, :3], torch.zeros(2, 1), NOISE.embeds, start_frame=0, store=True)
    frames = torch.tensor([timesteps] * 2)
    right = stack.flow(x[:, 3:], frames, NOISE.embeds, start_frame=3)

    ours = CausalTransformer(loaded, numerics="upstream")
    geometry = ours.geometry(SHAPE, frames_per_block=3, batch_size=2)
    cache = KVCache(make_policy("full"), geometry, attention=sdpa, phase_dtype=ours.phase_dtype)
    prompt = Prompt(NOISE.embeds.to(dtype))
    with ours.installed():
        ours.flow(x[:, :3], segments=[Segment(Pass("commit", 0, 0, 3), 0.0)], cache=cache, prompt=prompt)
        segments = [Segment(Pass("denoise", 1, 3, 3), timesteps)]
        assert torch.equal(ours.flow(x[:, 3:], segments=segments, cache=cache, prompt=prompt), right)


def test_rolling_windows_and_prompt_switches_run_in_half_precision(build):
    _, loaded = build()
    sampler = {"name": "rolling_window", "timesteps": [1000, 600, 200]}
    for settings in (
        {"sampler": sampler, "cache": "rolling_forcing"},
        {"cache": "longlive", "schedule": [(3, NOISE.embeds.flip(0), "recache")]},
    ):
        latents = roll(loaded, "upstream", **settings)
        assert latents.dtype == torch.bfloat16 and latents.isfinite().all()


def test_saved_rollout_goes_on_bit_for_bit(build):
    _, loaded = build()
    settings = {"num_frames": 9, "frame_shape": SHAPE, "cache": "attention_sink", "noise": NOISE}
    whole = LatentRollout(loaded, NOISE.embeds, numerics="upstream", **settings)
    whole.next_block()
    tensors, numbers = whole.state_dict()
    continued = LatentRollout(loaded, NOISE.embeds, numerics="upstream", **settings)
    continued.load_state_dict(tensors, numbers)
    rest = [block.latents for block in whole]
    assert all(torch.equal(a, b.latents) for a, b in zip(rest, continued, strict=True))


def test_weights_and_stock_forward_are_untouched(build):
    _, loaded = build()
    before = {name: weight.clone() for name, weight in loaded.state_dict().items()}
    arguments = (NOISE.noise[:, :3].transpose(1, 2).bfloat16(), torch.tensor([5.0, 7.0]), NOISE.embeds.bfloat16())
    with torch.no_grad():
        stock = loaded(*arguments).sample
        roll(loaded, "upstream")
        assert torch.equal(loaded(*arguments).sample, stock)
    for name, weight in loaded.state_dict().items():
        assert weight.dtype == before[name].dtype and torch.equal(weight, before[name]), name
    for module in loaded.modules():
        registry = vars(module).get("_diffusers_hook")
        assert registry is None or not registry.hooks


def test_what_does_not_fit_is_refused(build):
    _, loaded = build()
    with pytest.raises(ValueError, match="native, upstream"):
        roll(loaded, "exact")
    with pytest.raises(ValueError, match="few_step, rolling_window"):
        roll(loaded, "upstream", sampler="multi_step")
    with pytest.raises(ValueError, match="sequential offload"):
        CausalTransformer(loaded.to("meta"), numerics="upstream")
