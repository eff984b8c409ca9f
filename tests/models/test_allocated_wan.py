"""Step allocation in a stock pipeline: stock where nothing is skipped, else a slow loop; counts; stock afterwards."""

import copy
import math
from functools import partial
from itertools import pairwise

import pytest
import stock_wan
import torch
from diffusers import FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from step_allocation_loop import denoise
from stock_wan import state_of

from longtake.models import bidirectional
from longtake.models.bidirectional import StepAllocation, _relative_change, allocated_wan, sparse_wan

NUM_FRAMES, GRID, CHANNELS, PATCH = 3, 4, 4, 2
NUM_TOKENS = NUM_FRAMES * GRID * GRID
NUM_STEPS = 10
HALF = StepAllocation(target=0.55, num_warmup_steps=3)
SIGMAS = [1 - step / 40 for step in range(41)]
ALL = StepAllocation(target=1.0, num_warmup_steps=2, strides=(1,))
film = partial(stock_wan.film, num_latent_frames=NUM_FRAMES, num_inference_steps=NUM_STEPS)


@pytest.fixture
def pipe(tiny_folder):
    return stock_wan.stock_pipe(tiny_folder)


def tokens_of(latents):
    """(batch, channels, frames, height, width) -> (batch, tokens, channels of a patch)."""
    cut = latents.unflatten(4, (GRID, PATCH)).unflatten(3, (GRID, PATCH))
    return cut.permute(0, 2, 3, 5, 4, 6, 1).flatten(4).flatten(1, 3)


def latents_of(tokens):
    cut = tokens.unflatten(2, (PATCH, PATCH, CHANNELS)).unflatten(1, (NUM_FRAMES, GRID, GRID))
    return cut.permute(0, 6, 1, 2, 4, 3, 5).flatten(5).flatten(3, 4)


class Stale:
    """Computes every token, then puts last keys and values in the place of those that are not due."""

    def __init__(self):
        self.active, self.kept, self.stock = None, {}, WanAttnProcessor()

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        handles = [getattr(attn, name).register_forward_hook(self.put_back) for name in ("to_k", "to_v")]
        try:
            return self.stock(attn, hidden_states, None, None, rotary_emb)
        finally:
            for handle in handles:
                handle.remove()

    def put_back(self, layer, _, fresh):
        if self.active is not None:
            fresh = self.kept[layer].index_copy(1, self.active, fresh[:, self.active])
        self.kept[layer] = fresh
        return fresh


@torch.no_grad()
def slow_film(pipe, allocation):
    """Without guidance: the method's own loop over a network that computes every token in every step."""
    transformer = copy.deepcopy(pipe.transformer)
    for block in transformer.blocks:
        block.attn1.set_processor(Stale())
    texts = ["red circle", "blue square moving left"]
    embeds, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=8)
    pipe.scheduler.set_timesteps(NUM_STEPS)

    def velocity(state, sigma, active):
        for block in transformer.blocks:
            block.attn1.processor.active = active
        timestep = torch.full((2,), 1000.0 * sigma)
        out = transformer(latents_of(state), timestep, embeds, return_dict=False)[0]
        whole = tokens_of(out)
        return whole if active is None else whole[:, active]

    state, share = denoise(
        velocity, tokens_of(stock_wan.noise(NUM_FRAMES)), pipe.scheduler.sigmas.tolist(), allocation=allocation
    )
    return latents_of(state), share


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_tokens_with_every_step_make_the_stock_pipelines_video(pipe, guidance_scale):
    stock = film(pipe, guidance_scale=guidance_scale)
    with allocated_wan(pipe, ALL) as allocated:
        again = film(pipe, guidance_scale=guidance_scale)
    assert (again - stock).abs().max() < 1e-5 and allocated.share == 1.0
    assert allocated.num_tokens == 2 * NUM_TOKENS * NUM_STEPS * (2 if guidance_scale > 1 else 1)


def test_a_real_allocation_is_the_slow_loop(pipe, monkeypatch):
    stock = film(pipe, guidance_scale=1.0)
    expected, share = slow_film(pipe, HALF)
    with allocated_wan(pipe, HALF) as allocated:
        video = film(pipe, guidance_scale=1.0)
    assert (video - expected).abs().max() < 1e-4 < 1e-2 < (video - stock).abs().max()
    assert allocated.share == pytest.approx(share)
    # Active tokens that see only each other make another video.
    monkeypatch.setattr(bidirectional, "_updated", lambda cache, layer, k, v, active: (k, v))
    with allocated_wan(pipe, HALF):
        assert (film(pipe, guidance_scale=1.0) - expected).abs().max() > 1e-3


def test_what_is_planned_is_what_is_spent(pipe, monkeypatch):
    plans = []
    assign = StepAllocation.assign

    def spy(self, change, num_steps):
        plans.append(assign(self, change, num_steps))
        return plans[-1]

    monkeypatch.setattr(StepAllocation, "assign", spy)
    with allocated_wan(pipe, {"target": 0.55, "num_warmup_steps": 3}) as allocated:
        first = film(pipe)
        once = allocated.num_computed
        second = film(pipe)
    assert torch.equal(first, second) and allocated.num_computed == 2 * once, "nothing leaks into the second video"
    assert len(plans) == 2 and len(plans[0]) == NUM_TOKENS and len(plans[0].unique()) > 1
    active = [HALF.active(plans[0], step, NUM_STEPS) for step in range(3, NUM_STEPS)]
    planned = 3 * NUM_TOKENS + sum(NUM_TOKENS if rows is None else len(rows) for rows in active)
    assert once == 2 * 2 * planned, "two samples, two guidance branches"
    assert allocated.share == planned / (NUM_TOKENS * NUM_STEPS) == pytest.approx(0.55, abs=0.02)
    assert str(allocated).startswith("step allocation: 0.5")


def test_the_network_runs_over_active_tokens_only(pipe):
    lengths = []
    ffn = pipe.transformer.blocks[-1].ffn
    handle = ffn.register_forward_hook(lambda _, args, __: lengths.append(args[0].shape[1]))
    with allocated_wan(pipe, HALF) as allocated:
        film(pipe)
    handle.remove()
    assert 2 * sum(lengths) == allocated.num_computed and min(lengths) < NUM_TOKENS == lengths[-1]


def test_both_networks_of_wan22_and_fused_projections(pipe):
    pipe.transformer.fuse_qkv_projections()
    pipe.transformer_2 = copy.deepcopy(pipe.transformer)
    pipe.register_to_config(boundary_ratio=0.9)
    stock = film(pipe)
    with allocated_wan(pipe, ALL):
        assert (film(pipe) - stock).abs().max() < 1e-5
    for num_warmup_steps in (2, 5):
        with allocated_wan(pipe, StepAllocation(target=0.75, num_warmup_steps=num_warmup_steps)) as allocated:
            assert film(pipe).isfinite().all()
        # The second network begins with all tokens, so it may cost more than planned, never the whole.
        assert 0.5 < allocated.share < 1.0


@pytest.mark.parametrize("is_broken_off", [False, True])
def test_nothing_is_left_behind(pipe, is_broken_off):
    stock, before = film(pipe), state_of(pipe)

    def stop(pipe, index, timestep, values):
        if is_broken_off and index == 4:
            raise KeyboardInterrupt
        return values

    try:
        with allocated_wan(pipe, HALF):
            assert state_of(pipe) != before
            film(pipe, callback_on_step_end=stop)
    except KeyboardInterrupt:
        assert is_broken_off
    assert state_of(pipe) == before and torch.equal(film(pipe), stock)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 2}, "target=2 must be"),
        ({"targe": 0.5}, "unknown key 'targe'.*target"),
        ({"num_warmup_steps": 1}, "num_warmup_steps=1 must be 2 or more"),
        ({"strides": [2, 2]}, r"strides=\[2, 2\] must ascend"),
    ],
)
def test_bad_settings_are_refused(pipe, options, message):
    with pytest.raises(ValueError, match=message), allocated_wan(pipe, options):
        pytest.fail("the block must not begin")


def test_steps_that_do_not_fit_the_allocation_are_refused(pipe):
    for options, num_steps, message in (
        ({"target": 0.1}, 10, r"target=0.1 cannot be met in 10 steps, only 0\.\d+ to 1\.000"),
        ({"num_warmup_steps": 3}, 3, "num_warmup_steps=3 leaves none of 3 steps"),
    ):
        with allocated_wan(pipe, options), pytest.raises(ValueError, match=message):
            film(pipe, num_inference_steps=num_steps)


@torch.no_grad()
def test_what_does_not_fit_is_refused(pipe):
    with sparse_wan(pipe), pytest.raises(ValueError, match="has a _SparseWanProcessor: allocated_wan"):
        allocated_wan(pipe).__enter__()
    euler, pipe.scheduler = pipe.scheduler, UniPCMultistepScheduler(use_flow_sigmas=True)
    with pytest.raises(ValueError, match="UniPCMultistepScheduler mixes velocities"), allocated_wan(pipe):
        pass
    pipe.scheduler = euler
    with allocated_wan(pipe, HALF):
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
        with pytest.raises(ValueError, match="adds noise"):
            film(pipe)
        pipe.scheduler = euler
        euler.set_timesteps(NUM_STEPS)
        inputs = {"hidden_states": stock_wan.noise(NUM_FRAMES), "encoder_hidden_states": torch.randn(2, 6, 32)}
        inputs["timestep"] = euler.timesteps[:1].repeat(2)

        def refused(message, **changes):
            with pytest.raises(ValueError, match=message):
                pipe.transformer(**inputs | changes)

        with torch.enable_grad():
            refused("torch.no_grad")
        refused("a timestep for each token", timestep=euler.timesteps[:1].repeat(2, NUM_TOKENS))
        pipe.transformer.enable_cache(FirstBlockCacheConfig())
        refused("a diffusers cache")
        pipe.transformer.disable_cache()
        pipe.transformer.blocks[1].attn1.set_processor(WanAttnProcessor())
        refused("has taken the place of allocated_wan's processor")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    target=st.floats(0.3, 1.0),
    num_warmup_steps=st.integers(2, 6),
    num_steps=st.integers(20, 60),
    num_tokens=st.integers(50, 400),
)
def test_the_budget_is_met(target, num_warmup_steps, num_steps, num_tokens):
    allocation = StepAllocation(target=target, num_warmup_steps=num_warmup_steps)
    try:
        shares = allocation.shares(num_steps)
    except ValueError:
        # Even a stride of 8 computes every token in the warm-up and in the last step.
        assert target * num_steps < num_warmup_steps + (num_steps - num_warmup_steps) / 8 + 2
        return
    assert math.isclose(sum(shares), 1) and min(shares) >= 0
    ratios = [b / a for a, b in pairwise(shares) if a > 1e-9 and b > 1e-9]
    assert all(math.isclose(ratio, ratios[0], rel_tol=1e-6) for ratio in ratios)
    strides = allocation.assign(random(num_tokens).abs(), num_steps)
    computed = num_warmup_steps * num_tokens
    for step in range(num_warmup_steps, num_steps):
        active = allocation.active(strides, step, num_steps)
        computed += num_tokens if active is None else len(active)
    # Shares are whole tokens: each edge between two groups is half a token off at most.
    assert computed / (num_steps * num_tokens) == pytest.approx(target, abs=3 / num_tokens)


def test_tokens_that_change_most_have_the_smallest_stride():
    change = torch.tensor([0.1, 3.0, 0.2, 2.0, 0.05, 1.0, 0.5, 0.4])
    strides = StepAllocation(target=0.5).assign(change, 40)
    by_change = strides[change.argsort(descending=True)]
    assert torch.equal(by_change, by_change.sort().values) and by_change.unique().numel() > 2


def test_change_is_relative_and_the_mean_of_the_batch():
    before = torch.tensor([[[1.0, -1.0], [2.0, 0.0]], [[1.0, 1.0], [0.0, 4.0]]])
    after = torch.tensor([[[2.0, -1.0], [2.0, 0.0]], [[1.0, 1.0], [0.0, 2.0]]])
    assert _relative_change(after, before).tolist() == pytest.approx([0.25, 0.25], abs=1e-5)


@pytest.mark.parametrize("target", [0.3, 0.75])
def test_tokens_at_constant_velocity_lose_nothing(target):
    """Straight paths are exact however few steps they have: skipped stretches are made up for in one."""
    speed = random(2, 120, 4)

    def velocity(x, sigma, active):
        return speed if active is None else speed[:, active]

    x = random(2, 120, 4, seed=1)
    found, share = denoise(velocity, x, SIGMAS, allocation=StepAllocation(target=target))
    assert share == pytest.approx(target, abs=0.02)
    assert torch.allclose(found, x - speed, atol=1e-5)
