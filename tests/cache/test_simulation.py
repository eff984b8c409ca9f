"""A policy played without a model reads what the traces of its paper say, and costs what its sizes say."""

import pytest
import torch

from longtake.cache import (
    POLICIES,
    BlockTrace,
    CachePolicy,
    Context,
    EncodeJob,
    Geometry,
    HeadGroup,
    KeysValues,
    PolicyState,
    Read,
)
from longtake.cache.base import CacheStats
from longtake.cache.simulation import job_shape, simulate

GEOMETRY = Geometry(num_layers=2, num_heads=4, head_dim=12, num_rows=4, num_columns=4, frames_per_block=3)


# Presets with the published sizes of blocks of 3 that have to refuse blocks of 4.
NO_ROOM = {("relax", 4), ("slow_fast", 4)}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("block", [1, 3, 4])
def test_every_policy_can_be_played_and_sizes_do_not_depend_on_the_device(name, block):
    """Sizes on the meta device are what real tensors have; frames read exist, and are named."""
    from longtake.scripts.policies import _toy_geometry, preset_policy

    policy = preset_policy(name)
    if (name, block) in NO_ROOM:
        with pytest.raises(ValueError, match=f"block of {block} frames.* use 8 or more"):
            policy.start(_toy_geometry(block))
        return
    real = _toy_geometry(block)
    sizes = []
    for device in ("cpu", "meta"):
        shapes = Geometry(**{**vars(real), "device": torch.device(device)})
        sizes.append([])
        for played in simulate(policy, shapes, 9):
            sizes[-1].append((played.denoise.num_tokens, dict(played.stats.tokens), played.stats.num_bytes))
            for span in played.denoise.spans:
                assert span.frames and max(span.frames) < played.start_frame, span
                assert span.role and span.num_tokens > 0
    assert sizes[0] == sizes[1]


class Odd(CachePolicy):
    """Reads by heads, by token and only in commits; asks for a pooled forward at a change of prompt."""

    name, source = "odd", "test"
    events = frozenset({"keep", "recache"})

    def check(self, frames_per_block, num_frames=None):
        """Any block fits."""

    def start(self, geometry):
        return OddState(geometry)


class OddState(PolicyState):
    def __init__(self, geometry):
        self.geometry, self.seen = geometry, []

    def select(self, layer, pass_, q=None):
        if pass_.start_frame == 0 or pass_.kind == "encode":
            return Context((), (0.0,) * pass_.num_frames, holds="kind")
        few = KeysValues(*torch.zeros(2, 1, 8, 1, 12))
        coordinates = torch.tensor([[0.5, 0, 0]] * 6 + [[2.5, 0, 0]] * 2, dtype=torch.float64)
        memory = Read(few, coordinates, frames=(0, 1, 2), role="memory")
        whole = Read(KeysValues(*torch.zeros(2, 1, 16, 3, 12)), (1.0,), frames=(1,), role="sink")
        groups = (HeadGroup((0,), (memory,), 8), HeadGroup((1, 2, 3), (whole,), 16))
        return Context((), (7.0,) * pass_.num_frames, holds="kind", groups=groups if pass_.kind == "denoise" else ())

    def commit(self, layer, pass_, q, k, v):
        self.seen.append((layer, pass_.kind, pass_.label, q.shape[1]))

    def end_block(self, trace: BlockTrace):
        job = EncodeJob(trace.latents, trace.start_frame, label="small", pooling=(2, 2, 2))
        return [job] if trace.event == "recache" else []

    def stats(self):
        return CacheStats({"memory": len(self.seen)}, {"memory": 1})

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_head_groups_tokens_commits_and_jobs_are_noted():
    first, second, third = simulate(Odd(), GEOMETRY, 3, events={2: "recache"})
    assert first.denoise.spans == () and first.commit is not None
    memory, sink = second.denoise.spans
    assert (memory.heads, memory.positions, memory.frames) == ((0,), (0.5, 2.5), (0, 1, 2))
    assert memory.shares == pytest.approx((8 / 48,) * 3) and sink.heads == (1, 2, 3) and sink.share == 1.0
    assert second.denoise.num_tokens == (8 * 1 + 16 * 3) / 4 and second.denoise.is_bounded
    assert second.commit.spans == () and [b.event for b in (first, second, third)] == ["keep", "keep", "recache"]
    (job,) = second.jobs
    assert (job.pass_.kind, job.pass_.label, job.pass_.num_frames, job.pass_.grid) == ("encode", "small", 1, (2, 2))
    assert second.stats.tokens["memory"] == 2 + 2 + 2  # two commits and a job, in two layers


def test_job_shapes_follow_pooling_and_added_tokens():
    wan = Geometry(num_layers=1, num_heads=1, head_dim=12, num_rows=30, num_columns=52, frames_per_block=4)
    latents = torch.empty(1, 4, 16, 60, 104, device="meta")
    assert job_shape(EncodeJob(latents, 0), wan) == (4, None)
    assert job_shape(EncodeJob(latents, 0, pooling=(2, 4, 4)), wan) == (2, (7, 13))
    assert job_shape(EncodeJob(latents, 0, tokens=torch.empty(1, 8, 2, 7, 13)), wan) == (2, (7, 13))


def test_events_that_cannot_be_played_are_refused():
    with pytest.raises(ValueError, match="does not know the event 'cut'; known: keep, recache"):
        list(simulate(Odd(), GEOMETRY, 3, events={1: "cut"}))
    with pytest.raises(ValueError, match="there are blocks 1 to 2"):
        list(simulate(Odd(), GEOMETRY, 3, events={3: "recache"}))
