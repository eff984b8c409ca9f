"""Upstream numerics equal a plain restatement of the published code bit for bit; native ones do not, and need not."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from longtake.attention import sdpa
from longtake.cache import KVCache, Pass, make_policy
from longtake.models import CausalTransformer, Prompt, Segment, causal
from longtake.pipelines import rollout_latents
from longtake.pipelines.rollout import LatentRollout
from longtake.rope import apply_phases, axis_frequencies, rotate, token_phases
from longtake.samplers import renoised

_spec = importlib.util.spec_from_file_location(
    "upstream_wan", Path(__file__).parents[1] / "reference" / "upstream_wan.py"
)
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

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


def build(head_dim=24, dtype=torch.bfloat16):
    """A float32 transformer, and one whose weights are loaded as diffusers loads them in ``dtype``."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=head_dim,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
    ).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:  # as made they are ones, and the order of cast and product would not show
            weight.data = torch.randn_like(weight) * 0.3 + 1
    loaded = copy.deepcopy(model)
    for name, weight in loaded.named_parameters():
        if not set(name.split(".")) & set(loaded._keep_in_fp32_modules):
            weight.data = weight.data.to(dtype)
    return model, loaded


@pytest.fixture(autouse=True)
def one_attention(monkeypatch):
    """The same kernel on both sides, whatever this machine has."""
    monkeypatch.setattr(causal, "fastest", lambda *_: sdpa)


def roll(model, numerics, *, merge=False, **settings):
    settings = {"num_frames": 9, "frame_shape": SHAPE, "cache": "full", "noise": NOISE} | settings
    rollout = LatentRollout(model, NOISE.embeds, merge_commit=merge, numerics=numerics, **settings)
    return torch.cat([block.latents for block in rollout], dim=1)


def expected(model, dtype, **variant):
    stack = reference.UpstreamWan(model, dtype, **variant)
    return stack.rollout(NOISE.embeds, NOISE.noise, NOISE.after, sigmas=SIGMAS, block=3)


@pytest.mark.parametrize("head_dim", [24, 128])
def test_bfloat16_rollout_is_the_published_one_bit_for_bit(head_dim):
    model, loaded = build(head_dim)
    right = expected(model, torch.bfloat16)
    for merge in (False, True):
        ours = roll(loaded, "upstream", merge=merge)
        assert ours.dtype == torch.bfloat16 and torch.equal(ours, right), merge
    native = roll(loaded, "native")
    assert native.dtype == torch.float32 and (native - right.float()).abs().mean() > 1e-3
    wrong = expected(model, torch.bfloat16, norm=reference.rms_norm_rounded_once)
    assert not torch.equal(wrong, right), "one rounding point elsewhere must show"


def test_float32_rollouts_agree():
    model, _ = build()
    native, upstream = roll(model, "native"), roll(model, "upstream")
    assert upstream.dtype == torch.float32
    assert (native - upstream).abs().max() < 1e-5
    assert (upstream - expected(model, torch.float32)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_timestep_per_frame(dtype):
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


def test_rolling_windows_and_prompt_switches_run_in_half_precision():
    _, loaded = build()
    sampler = {"name": "rolling_window", "timesteps": [1000, 600, 200]}
    latents = roll(loaded, "upstream", sampler=sampler, cache="rolling_forcing")
    assert latents.dtype == torch.bfloat16 and latents.isfinite().all()
    switch = [(3, NOISE.embeds.flip(0), "recache")]
    blocks = rollout_latents(
        loaded,
        NOISE.embeds,
        num_frames=9,
        frame_shape=SHAPE,
        cache="longlive",
        noise=NOISE,
        schedule=switch,
        numerics="upstream",
    )
    assert all(block.latents.isfinite().all() for block in blocks)


def test_saved_rollout_goes_on_bit_for_bit():
    _, loaded = build()
    settings = {"num_frames": 9, "frame_shape": SHAPE, "cache": "attention_sink", "noise": NOISE}
    whole = LatentRollout(loaded, NOISE.embeds, numerics="upstream", **settings)
    whole.next_block()
    tensors, numbers = whole.state_dict()
    continued = LatentRollout(loaded, NOISE.embeds, numerics="upstream", **settings)
    continued.load_state_dict(tensors, numbers)
    rest = [block.latents for block in whole]
    assert all(torch.equal(a, b.latents) for a, b in zip(rest, continued, strict=True))


def test_weights_and_stock_forward_are_untouched():
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


def test_what_does_not_fit_is_refused():
    _, loaded = build()
    with pytest.raises(ValueError, match="native, upstream"):
        roll(loaded, "exact")
    with pytest.raises(ValueError, match="few_step, rolling_window"):
        roll(loaded, "upstream", sampler="multi_step")
    with pytest.raises(ValueError, match="sequential offload"):
        CausalTransformer(loaded.to("meta"), numerics="upstream")


def test_double_phases_rotate_in_double():
    frequencies = axis_frequencies(24)
    coordinates = torch.rand(300, 3, dtype=torch.float64) * 50
    x = torch.randn(1, 300, 2, 24, dtype=torch.float64)
    phases = token_phases(coordinates, frequencies=frequencies, dtype=torch.complex128)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    exact = torch.view_as_real(pairs * phases[:, None]).flatten(-2)
    assert torch.equal(apply_phases(x, phases), exact)
    assert torch.equal(apply_phases(x.float(), phases), apply_phases(x.float().double(), phases).float())
    single = rotate(x.float(), coordinates, frequencies=frequencies)
    assert 0 < (single - apply_phases(x.float(), phases)).abs().max() < 1e-5


def test_half_precision_is_renoised_in_float32():
    x0, noise = NOISE.noise.bfloat16(), NOISE.noise.flip(1).bfloat16()
    sigma = torch.tensor(2.5 / 3)
    right = ((1 - sigma) * x0.float() + sigma * noise.float()).bfloat16()
    assert torch.equal(renoised(x0, noise, 2.5 / 3), right)
    assert not torch.equal((1 - sigma.item()) * x0 + sigma.item() * noise, right)
    exact = renoised(x0.double(), noise.double(), 0.3)
    assert exact.dtype == torch.float64 and torch.equal(exact, 0.7 * x0.double() + 0.3 * noise.double())
