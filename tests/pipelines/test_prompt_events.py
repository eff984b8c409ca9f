"""Effects of a change of prompt on the cache, and the forwards that a policy asks for."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from rollouts import SHAPE, RecordedNoise, assert_resumes_everywhere, given_latents
from torch.nn import functional

from longtake.cache import Context, EncodeJob, KeysValues, Read, Traits
from longtake.cache.frames import FrameState
from longtake.cache.policies.attention_sink import AttentionSink
from longtake.models.causal import CausalTransformer
from longtake.pipelines import LatentRollout, PromptSwitch

STEPS = {"name": "few_step", "timesteps": [1000, 500]}
GUIDED = {"name": "multi_step", "num_inference_steps": 2, "solver": "euler", "guidance_scale": 3.0}


@dataclass(frozen=True, kw_only=True)
class Remember(AttentionSink):
    """Sink and window; every event but ``keep`` encodes the block before again and reads that beside the rest."""

    name: ClassVar[str] = "remember"
    events: ClassVar[frozenset] = frozenset({"keep", "recache", "cut"})
    num_context_frames: int = 9
    positions: str = "absolute"
    pooling: tuple | None = None
    tokens: float | None = None
    every_block: bool = False

    @property
    def traits(self):
        return Traits(takes_windows=True, needs_vae=self.pooling is not None)

    def start(self, geometry):
        return RememberState(self, geometry)


class RememberState(FrameState):
    def __init__(self, policy, geometry):
        super().__init__(policy, geometry)
        self.merges_commit = not policy.every_block
        self.encoded, self.seen, self.passes = {}, [], []

    def select(self, layer, pass_, q=None):
        if layer == 0:
            self.passes.append(pass_)
        if pass_.kind == "encode":
            rows, columns = pass_.grid or (self.geometry.num_rows, self.geometry.num_columns)
            axes = [torch.arange(float(n), dtype=torch.float64) for n in (pass_.num_frames, rows, columns)]
            return Context((), torch.cartesian_prod(*axes) if pass_.grid else tuple(axes[0].tolist()))
        context = super().select(layer, pass_, q)
        if layer not in self.encoded:
            return context
        stored = KeysValues(*self.encoded[layer])
        extra = Read(stored, torch.zeros(stored.num_tokens, 3, dtype=torch.float64), role="memory")
        return replace(context, reads=(*context.reads, extra), capacity=0)

    def commit(self, layer, pass_, q, k, v):
        if pass_.kind == "encode":
            self.encoded[layer] = k.clone(), v.clone()
        else:
            super().commit(layer, pass_, q, k, v)

    def end_block(self, trace):
        self.seen.append((trace.block_index, trace.event))
        if trace.event == "keep" and not self.policy.every_block:
            return []
        tokens = None
        if self.policy.tokens is not None:
            g = self.geometry
            frames = trace.latents.shape[1]
            shape = (1, g.num_heads * g.head_dim, frames, g.num_rows, g.num_columns)
            tokens = self.policy.tokens * ramp(shape[1]).view(1, -1, 1, 1, 1).expand(shape)
        return [
            EncodeJob(
                trace.latents,
                trace.start_frame,
                timestep=125.0,
                label=trace.event,
                pooling=self.policy.pooling,
                tokens=tokens,
            )
        ]

    def state_dict(self):
        extra = {f"encoded.{i}.{n}": t for i, kv in self.encoded.items() for n, t in zip("kv", kv, strict=True)}
        return super().state_dict() | extra

    def load_state_dict(self, state):
        own = {key: value for key, value in state.items() if key.startswith("encoded")}
        super().load_state_dict({key: value for key, value in state.items() if key not in own})
        layers = {key.split(".")[1] for key in own}
        self.encoded = {int(i): (own[f"encoded.{i}.k"], own[f"encoded.{i}.v"]) for i in layers}


def ramp(dim):
    """Differs between channels: the first norm takes away what they have in common."""
    return torch.arange(dim) / dim


class Halving:
    """Pools without a VAE, into rows and columns that do not fill a patch."""

    def __init__(self):
        self.asked = []

    def pool(self, latents, size):
        self.asked.append(size)
        return functional.interpolate(latents[:, 0], (3, 5))[:, None]


@pytest.fixture
def flows(monkeypatch):
    """(kinds, timesteps, prompt) of every forward."""
    seen, plain = [], CausalTransformer.flow

    def flow(self, x, *, segments, prompt, **rest):
        kinds = "+".join(segment.pass_.kind for segment in segments)
        seen.append((kinds, segments[0].timestep, round(prompt.embeds.mean().item())))
        return plain(self, x, segments=segments, prompt=prompt, **rest)

    monkeypatch.setattr(CausalTransformer, "flow", flow)
    return seen


def prompt(value):
    return torch.full((1, 7, 16), float(value))


def make(transformer, schedule=(), **settings):
    settings = {"num_frames": 12, "frame_shape": SHAPE, "sampler": STEPS, "cache": Remember()} | settings
    rollout = LatentRollout(transformer, prompt(1), noise=RecordedNoise(), **settings)
    for switch in schedule:
        rollout.add_switch(switch)
    return rollout


def switch(start, value, event="keep"):
    return PromptSwitch(start, prompt(value), event)


def test_old_prompt_commits_and_new_prompt_encodes(transformer, flows):
    rollout = make(transformer, schedule=[switch(5, 2, "recache")], context_timestep=60)
    list(rollout)
    one, two = [("denoise", 1), ("denoise", 2)]
    assert [(kinds, value) for kinds, _, value in flows] == [
        *[one] * 2,
        ("commit+denoise", 1),
        one,
        ("commit", 1),
        ("encode", 2),
        *[two] * 2,
        ("commit+denoise", 2),
        two,
    ]
    assert [level for kinds, level, _ in flows if kinds in ("commit", "encode")] == [60.0, 125.0]
    state = rollout.branches.caches[0].state
    assert state.seen == [(0, "keep"), (1, "recache"), (2, "keep")]
    (encode,) = [p for p in state.passes if p.kind == "encode"]
    assert (encode.block_index, encode.start_frame, encode.num_frames) == (1, 3, 3)
    assert (encode.label, encode.grid) == ("recache", None)


@pytest.mark.parametrize(
    ("events", "counts"),
    [(("recache", "keep"), "recache"), (("keep", "cut"), "cut"), (("cut", "recache"), "cut"), (("keep",), "keep")],
)
def test_of_several_switches_the_last_prompt_and_the_strongest_event_count(transformer, flows, events, counts):
    rollout = make(transformer, schedule=[switch(4 + i, 2 + i, event) for i, event in enumerate(events)])
    blocks = list(rollout)
    assert rollout.branches.caches[0].state.seen[1] == (1, counts)
    last = len(events)
    assert [b.prompt_index for b in blocks] == [-1, -1, last - 1, last - 1]
    assert {value for _, _, value in flows} == {1, 1 + last}
    assert ("encode" in {kinds for kinds, _, _ in flows}) == (counts != "keep")


def test_an_event_right_after_given_latents(transformer, flows):
    settings = {"initial_latents": given_latents(6), "num_frames": 6, "context_timestep": 60}
    rollout = make(transformer, schedule=[switch(0, 2, "cut")], **settings)
    changed = list(rollout)
    assert [(kinds, level, value) for kinds, level, value in flows[:4]] == [
        ("commit", 0.0, 1),
        ("commit", 0.0, 1),
        ("encode", 125.0, 2),
        ("denoise", 1000.0, 2),
    ]
    assert rollout.branches.caches[0].state.seen[:2] == [(0, "keep"), (1, "cut")]
    kept = list(make(transformer, schedule=[switch(0, 2)], **settings))
    assert (changed[0].latents - kept[0].latents).abs().max() > 1e-3


def test_at_frame_0_there_is_nothing_to_act_on(transformer):
    rollout = make(transformer, schedule=[switch(0, 2, "cut")])
    changed = next(iter(rollout))
    settings = {"num_frames": 12, "frame_shape": SHAPE, "sampler": STEPS, "cache": Remember()}
    plain = LatentRollout(transformer, prompt(2), noise=RecordedNoise(), **settings)
    assert torch.equal(changed.latents, next(iter(plain)).latents)
    assert rollout.branches.caches[0].state.seen == []


def test_every_guidance_branch_encodes_pooled_latents_under_its_own_prompt(transformer, flows):
    settings = {"cache": Remember(pooling=(2, 4, 4)), "sampler": GUIDED, "negative_prompt_embeds": prompt(-7)}
    pixels = Halving()
    rollout = make(transformer, schedule=[switch(6, 2, "recache")], pixels=pixels, **settings)
    list(rollout)
    assert [value for kinds, _, value in flows if kinds == "encode"] == [2, -7]
    assert pixels.asked == [(2, 4, 4)], "the branches' jobs are the same latents: pooled once"
    first, second = (cache.state for cache in rollout.branches.caches)
    assert (first.encoded[1][0] - second.encoded[1][0]).abs().max() > 1e-4
    # Of three rows and five columns, one row and one column fill no patch.
    (encode,) = [p for p in first.passes if p.kind == "encode"]
    assert (encode.num_frames, encode.grid) == (1, (1, 2))
    assert first.encoded[0][0].shape == (1, 2, 2, 24)


def test_tokens_are_added_to_the_patch_embedding(transformer):
    """The embedding adds a bias: one that is larger by c and tokens of c are the same."""

    def encoded(tokens, raised=0.0):
        rollout = make(transformer, cache=Remember(tokens=tokens))
        rollout.next_block()
        bias = transformer.patch_embedding.bias.data
        kept = bias.clone()
        with rollout.causal.installed():
            rollout.branches.pending = replace(
                rollout.branches.pending,
                trace=replace(rollout.branches.pending.trace, latents=torch.ones(1, 3, *SHAPE)),
            )
            bias += raised * ramp(48)
            rollout.branches.commit_pending(event="recache")
            bias.copy_(kept)
        return rollout.branches.caches[0].state.encoded[1][1]

    assert (encoded(0.5) - encoded(0.0, raised=0.5)).abs().max() < 1e-5
    assert (encoded(0.5) - encoded(0.0)).abs().max() > 1e-3


def test_tokens_of_another_shape_are_refused(transformer):
    settings = {"cache": Remember(tokens=1.0, pooling=(2, 4, 4)), "schedule": [switch(3, 2, "cut")]}
    with pytest.raises(ValueError, match=r"tokens of shape \(1, 48, 3, 2, 3\) cannot be added"):
        list(make(transformer, pixels=Halving(), **settings))


def test_a_policy_may_ask_after_every_block(transformer, flows):
    rollout = make(transformer, cache=Remember(every_block=True))
    list(rollout)
    assert [kinds for kinds, _, _ in flows] == ["denoise"] * 2 + (["commit", "encode"] + ["denoise"] * 2) * 3


@pytest.mark.parametrize(
    ("cache", "sampler"),
    [(Remember(), GUIDED), (Remember(every_block=True), STEPS), (Remember(pooling=(2, 4, 4)), GUIDED)],
)
def test_a_rollout_goes_on_bit_for_bit_around_events(transformer, cache, sampler):
    settings = {
        "cache": cache,
        "sampler": sampler,
        "schedule": [switch(9, 2, "recache"), switch(13, 3, "cut"), switch(15, 4)],
        "pixels": Halving(),
        "num_frames": 15,
        "initial_latents": given_latents(6),
    }
    whole = list(make(transformer, **settings))
    assert [b.prompt_index for b in whole] == [-1, 0, 0, 2, 2]
    assert_resumes_everywhere(lambda: make(transformer, **settings), whole)


def test_a_switch_says_at_which_block_it_takes_effect(transformer):
    given = torch.zeros(1, 4, *SHAPE)
    rollout = make(transformer, first_block_frames=1, initial_latents=given)
    assert [rollout.switch_index(switch(start, 2)) for start in (0, 4, 5, 7, 8, 10)] == [0, 0, 1, 1, 2, 2]
    assert [rollout.start_of(index) for index in range(3)] == [4, 7, 10]
    plain = make(transformer)
    assert [plain.switch_index(switch(start, 2)) for start in (0, 1, 3, 4)] == [0, 1, 1, 2]
    assert plain.add_switch(switch(3, 2, "cut")) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"schedule": [switch(3, 2, "flush")]},
            "'remember' does not support the prompt event 'flush': use 'keep', 'rec",
        ),
        ({"schedule": [switch(3, 2, "blink")]}, "unknown prompt event 'blink'; known: keep, recache, flush, cut"),
        ({"cache": Remember(pooling=(2, 4, 4))}, "needs a VAE"),
    ],
)
def test_what_a_policy_cannot_do_is_refused_before_any_work(transformer, flows, settings, message):
    with pytest.raises(ValueError, match=message):
        list(make(transformer, **settings))
    with pytest.raises(ValueError, match="unknown prompt event"):
        make(transformer).add_switch(switch(3, 2, "blink"))
    assert flows == []
