"""Step allocation in a stock pipeline: stock where nothing is skipped, else a slow loop; counts; stock afterwards."""

import copy

import pytest
import torch
from diffusers import FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from step_allocation_loop import denoise

from longtake.models.bidirectional import StepAllocation, _TokenCache, allocated_wan, sparse_wan

NUM_FRAMES, GRID, CHANNELS, PATCH = 3, 4, 4, 2  # 9 frames of 64 x 64 pixels, 48 tokens
NUM_TOKENS = NUM_FRAMES * GRID * GRID
NUM_STEPS = 10
HALF = StepAllocation(target=0.55, num_warmup_steps=3)
ALL = StepAllocation(target=1.0, num_warmup_steps=2, strides=(1,))


@pytest.fixture
def pipe(tiny_folder):
    pipe = WanPipeline.from_pretrained(tiny_folder)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    for block in pipe.transformer.blocks:
        block.attn1.norm_q.weight.data.mul_(4)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise():
    return torch.randn(2, CHANNELS, NUM_FRAMES, 8, 8, generator=torch.Generator().manual_seed(0))


def film(pipe, **options):
    options = {
        "prompt": ["red circle", "blue square moving left"],
        "negative_prompt": "plain",
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "num_inference_steps": NUM_STEPS,
        "guidance_scale": 4.0,
        "max_sequence_length": 8,
        "output_type": "latent",
        "latents": noise(),
    } | options
    return pipe(**options).frames


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
        self.active, self.kept, self.stock = None, None, WanAttnProcessor()

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        own = {name: getattr(attn, name) for name in ("to_k", "to_v")}
        fresh = {name: layer(hidden_states) for name, layer in own.items()}
        if self.active is not None:
            fresh = {name: self.kept[name].index_copy(1, self.active, fresh[name][:, self.active]) for name in fresh}
        self.kept = fresh
        try:
            for name in own:
                setattr(attn, name, Given(fresh[name]))
            return self.stock(attn, hidden_states, None, None, rotary_emb)
        finally:
            for name, layer in own.items():
                setattr(attn, name, layer)


class Given(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, _):
        return self.value


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

    state, share = denoise(velocity, tokens_of(noise()), pipe.scheduler.sigmas.tolist(), allocation=allocation)
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
    monkeypatch.setattr(_TokenCache, "update", lambda self, layer, k, v, active: (k, v))
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
    for num_warmup_steps in range(2, 6):
        with allocated_wan(pipe, StepAllocation(target=0.75, num_warmup_steps=num_warmup_steps)) as allocated:
            assert film(pipe).isfinite().all()
        # The second network begins with all tokens, so it may cost more than planned, never the whole.
        assert 0.5 < allocated.share < 1.0


@pytest.mark.parametrize("is_broken_off", [False, True])
def test_nothing_is_left_behind(pipe, is_broken_off):
    def state():
        modules = pipe.transformer.named_modules()
        hooks = {name: (len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in modules}
        return {name: id(own) for name, own in pipe.transformer.attn_processors.items()}, hooks

    before, stock = state(), film(pipe)

    def stop(pipe, index, timestep, values):
        if is_broken_off and index == 4:
            raise KeyboardInterrupt
        return values

    try:
        with allocated_wan(pipe, HALF):
            assert state() != before
            film(pipe, callback_on_step_end=stop)
    except KeyboardInterrupt:
        assert is_broken_off
    assert state() == before and torch.equal(film(pipe), stock)


def test_what_does_not_fit_is_refused(pipe):
    for options, message in (
        ({"target": 2}, "target=2 must be"),
        ({"targe": 0.5}, "unknown key 'targe'.*target"),
        ({"num_warmup_steps": 1}, "num_warmup_steps=1 must be 2"),
    ):
        with pytest.raises(ValueError, match=message), allocated_wan(pipe, options):
            pass
    with allocated_wan(pipe, HALF), pytest.raises(ValueError, match="num_warmup_steps=3 leaves none of 3 steps"):
        film(pipe, num_inference_steps=3)
    with sparse_wan(pipe), pytest.raises(ValueError, match="has a SparseWanProcessor: allocated_wan"):
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
        given = {
            "hidden_states": noise(),
            "encoder_hidden_states": torch.randn(2, 6, 32),
            "timestep": euler.timesteps[:1].repeat(2),
        }
        with pytest.raises(ValueError, match="torch.no_grad"):
            pipe.transformer(**given)
        with torch.no_grad(), pytest.raises(ValueError, match="a timestep for each token"):
            pipe.transformer(**given | {"timestep": euler.timesteps[:1].repeat(2, NUM_TOKENS)})
        pipe.transformer.enable_cache(FirstBlockCacheConfig())
        with torch.no_grad(), pytest.raises(ValueError, match="a diffusers cache"):
            pipe.transformer(**given)
        pipe.transformer.disable_cache()
        pipe.transformer.blocks[1].attn1.set_processor(WanAttnProcessor())
        with torch.no_grad(), pytest.raises(ValueError, match="has taken the place of allocated_wan's processor"):
            pipe.transformer(**given)
