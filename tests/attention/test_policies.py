"""Properties of every sparse policy: settings, the dense beginning, plans that hold, plans that are shared."""

from dataclasses import fields, replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import yaml
from block_attention import attention, signature
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse import EAGER, tokens

from longtake.attention import AttentionGeometry, make_attention_policy, sparse_attention
from longtake.attention.geometry import make_geometry
from longtake.attention.policies import POLICIES, BlockPolicy, SparsePolicy, base
from longtake.attention.policies.base import DensityMeter
from longtake.attention.policies.window import Window

ROOT = Path(__file__).resolve().parents[2]
SPARSE = [name for name in POLICIES if name != "dense"]
TOKEN_POLICIES = [name for name in SPARSE if not POLICIES[name].is_static]
GRID = (10, 20)
PLACE = {"step_index": 2, "num_steps": 4, "layer": 2, "num_layers": 6}
CACHED = replace(make_geometry(12, GRID, block_frames=3), block_index=3, **PLACE)
BIDIRECTIONAL = AttentionGeometry.bidirectional(6, GRID, **PLACE)
# (policy, form) pairs that have no meaning.
REFUSED = {("light_forcing", "bidirectional")}
# A density below 1 with frames of 200 tokens.
SMALL = {
    "sliding_tile": {"tile": [3, 5, 5], "window": [1, 3, 3]},
    "svg2": {"top_p": 0.5},
    "window": {"num_window_frames": 2},
}
FORMS = {"cached": CACHED, "bidirectional": BIDIRECTIONAL}
CASES = [(name, form) for name in SPARSE for form in FORMS if (name, form) not in REFUSED]


def make(name, **changes):
    return make_attention_policy({"policy": name} | SMALL.get(name, {}) | changes)


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_a_file_with_its_name_and_a_preset(name):
    cls = POLICIES[name]
    assert cls.name == name and cls.source
    preset = yaml.safe_load((files("longtake.configs") / "attention" / f"{name}.yaml").read_text(encoding="utf-8"))
    policy = make_attention_policy(preset)
    assert policy == cls(), "presets are the defaults"
    assert set(preset) == {"policy", *(field.name for field in fields(cls))}, "every field is in the preset"
    assert make_attention_policy(policy.settings()) == policy == make_attention_policy(name)
    assert make_attention_policy(policy) is policy
    assert {entry.name for entry in (files("longtake.configs") / "attention").iterdir()} == {
        f"{n}.yaml" for n in POLICIES
    }


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ("radail", "unknown attention policy 'radail'.*Did you mean 'radial'"),
        ({"policy": "radial", "decay": 1}, "unknown key 'decay' for attention policy 'radial'.*decay_factor"),
        ({"policy": "svg", "density": "low"}, "density of attention policy 'svg' is 'low' but must be a number"),
        ({"policy": "radial", "dense_steps": -1}, "dense_steps=-1 must be 0 or more"),
        ({"policy": "radial", "block_size": 0}, "block_size=0 must be 1 or more"),
        ({"policy": "radial", "decay_factor": 0.0}, "decay_factor=0.0 must be above 0"),
        ({"policy": "radial", "model": "ltx"}, "model of .* is 'ltx'; known: 'wan', 'hunyuan'"),
        ({"policy": "window", "num_window_frames": -1}, "num_window_frames=-1"),
        ({"policy": "svg", "density": 0.0}, "density=0.0 must be above 0 and at most 1"),
        ({"policy": "svg", "block_size": 0}, "block_size=0"),
        ({"policy": "svg2", "top_p": 1.5}, "top_p=1.5 must be from 0 to 1"),
        ({"policy": "svg2", "num_key_clusters": 0}, "num_key_clusters=0"),
        ({"policy": "paro", "order": "hwt"}, "order='hwt' is unknown; known: fhw"),
        ({"policy": "paro", "density": 0.0}, "density=0.0"),
        ({"policy": "sliding_tile", "tile": [6, 8]}, "tile=.*three numbers"),
        ({"policy": "sliding_tile", "window": [0, 1, 1]}, "window=.*three numbers"),
        ({"policy": "sliding_tile", "head_windows": [[1, 1, 1], [1, 1]]}, "head_windows=.*three numbers"),
        ({"policy": "light_forcing", "sparsity": 1.0}, "sparsity=1.0"),
        ({"policy": "light_forcing", "sparsity": 0.9, "base_sparsity": 0.8}, "base_sparsity=0.8"),
        ({"policy": "light_forcing", "num_kept_frames": 1}, "use 2 or more"),
        ({"policy": "light_forcing", "block_size": 0}, "block_size=0"),
        ({"policy": "light_forcing", "query_block_size": 0}, "query_block_size=0"),
        ({"policy": "window", "commit_pass": "skip"}, "commit_pass of .* is 'skip'; known: 'dense', 'sparse'"),
        ({}, "need a key 'policy'"),
    ],
)
def test_settings_that_do_not_fit_are_named(values, match):
    with pytest.raises(ValueError, match=match):
        make_attention_policy(values)


@pytest.mark.parametrize(("name", "form"), CASES)
def test_plans_hold_and_attention_is_the_softmax_over_them(name, form):
    geometry, policy = FORMS[form], make(name)
    tensors, masks = tokens(geometry, batch=2), []
    for q, k, v in zip(*(x.split(1) for x in tensors), strict=True):
        plan = policy.plan(q, k, geometry, v=v)
        plan.validate()
        assert (plan.num_queries, plan.num_keys) == (geometry.num_queries, geometry.num_keys)
        assert plan.num_heads in (1, 4) and plan.counts.device.type == "cpu"
        assert 0.02 < plan.density < 1
        assert signature(policy.plan(q, k, geometry, v=v)) == signature(plan), "the same call, the same plan"
        masks.append(plan.to_dense_mask().expand(4, -1, -1))
        expected, _ = attention(q, k, v, masks[-1][None])
        assert (sparse_attention(q, k, v, geometry, policy=policy) - expected).abs().max() < 2e-6
    expected, _ = attention(*tensors, torch.stack(masks))
    assert (sparse_attention(*tensors, geometry, policy=policy) - expected).abs().max() < 2e-6


@pytest.mark.parametrize(("name", "form"), CASES)
def test_the_beginning_is_dense(name, form):
    geometry = FORMS[form]
    q, k, v = tokens(geometry)

    def is_dense(policy, **changes):
        return policy.plan(q, k, replace(geometry, **changes), v=v) is None

    policy = make(name)
    assert not is_dense(policy)
    assert is_dense(policy, layer=0) and is_dense(policy, step_index=0)
    assert is_dense(policy, kind="commit", step_index=0)
    assert is_dense(policy, block_index=0) is (form == "cached")
    eager = make(name, **EAGER, commit_pass="sparse")
    assert not is_dense(eager, layer=0) and not is_dense(eager, step_index=0)
    assert not is_dense(eager, kind="commit", step_index=0)
    late = make(name, dense_blocks=5, dense_layers=4, dense_steps=3)
    assert is_dense(late) and is_dense(late, layer=3, step_index=3)
    assert is_dense(late, layer=4, step_index=3, block_index=4) is (form == "cached")


def test_dense_declines_everything():
    q, k, v = tokens(CACHED)
    assert make_attention_policy("dense").plan(None, None, CACHED) is None
    dense = sparse_attention(q, k, v, CACHED, policy=make_attention_policy("dense"))
    assert (dense - attention(q, k, v)[0]).abs().max() < 2e-6


@pytest.mark.parametrize("name", TOKEN_POLICIES)
def test_policies_that_look_at_tokens_say_what_they_need(name):
    q, k, v = tokens(CACHED, batch=2)
    with pytest.raises(ValueError, match=f"{name!r} chooses blocks by the tokens: give it q"):
        make(name).plan(None, None, CACHED)
    with pytest.raises(ValueError, match="makes a plan for one sample, and got 2"):
        make(name).plan(q, k, CACHED, v=v)
    with pytest.raises(ValueError, match="do not fit the geometry, which has 600 and 2400"):
        make(name).plan(q[:1, :10], k[:1], CACHED, v=v[:1])


@pytest.mark.parametrize("name", TOKEN_POLICIES)
def test_half_precision_tokens_are_compared_in_full(name):
    geometry = CACHED
    q, k, v = tokens(geometry, dtype=torch.bfloat16)
    wide = [x.float() for x in (q, k, v)]
    half = make(name).plan(q, k, geometry, v=v)
    assert signature(half) == signature(make(name).plan(*wide[:2], geometry, v=wide[2]))


def test_asking_frames_have_to_be_among_the_keys():
    past = replace(CACHED, segments=tuple(replace(s, role="recent") for s in CACHED.segments))
    q, k, v = tokens(CACHED)
    for name in set(SPARSE) - {"window", "svg2"}:
        with pytest.raises(ValueError, match="needs the asking frames among the keys"):
            make(name).plan(q, k, past, v=v)


def rolling(block_index, *, positions):
    """A sink and a window of eight frames, as absolute positions or moved up behind the sink."""
    plain, last = make_geometry(9, GRID, block_frames=3), 3 * block_index + 2
    frames = (0, *range(last - 7, last + 1))
    places = tuple(map(float, frames if positions == "absolute" else range(9)))
    rows = zip(plain.segments, frames, places, strict=True)
    segments = tuple(replace(segment, frame=frame, position=place) for segment, frame, place in rows)
    own = {"query_frames": frames[-3:], "query_positions": places[-3:], "block_index": block_index}
    return replace(plain, segments=segments, **own, **PLACE)


@pytest.mark.parametrize("positions", ["absolute", "moved"])
@pytest.mark.parametrize("name", ["window", "radial"])
def test_a_window_that_rolls_on_has_one_plan(name, positions, monkeypatch):
    made = []
    cls = POLICIES[name]
    original = cls.layout_plan
    monkeypatch.setattr(base, "_PLANS", base.Recent(8))
    monkeypatch.setattr(cls, "layout_plan", lambda self, geometry: made.append(1) or original(self, geometry))
    policy = make(name)
    plans = {id(policy.plan(None, None, rolling(index, positions=positions))) for index in range(4, 40)}
    assert len(plans) == 1 and len(made) == 1
    layers = {id(policy.plan(None, None, replace(rolling(9, positions=positions), layer=i))) for i in range(1, 30)}
    assert layers == plans
    other = make(name, distance="global")
    assert id(other.plan(None, None, rolling(9, positions=positions))) not in plans
    assert len(base._PLANS) == 8, "few plans are kept"


def test_window_reads_near_frames_sinks_and_itself():
    policy = Window(num_window_frames=2, num_sink_frames=1, **EAGER)
    mask = policy.plan(None, None, make_geometry(9, GRID, block_frames=3, num_sinks=0)).block_mask[0]
    assert [row.nonzero()[:, 0].tolist() for row in mask] == [[0, 4, 5, 6, 7, 8], [0, 5, 6, 7, 8], [0, 6, 7, 8]]
    mask = policy.plan(None, None, AttentionGeometry.bidirectional(6, GRID)).block_mask[0]
    assert mask[0].tolist() == [True, True, True, False, False, False]
    bare = replace(policy, num_sink_frames=0, num_window_frames=0)
    mask = bare.plan(None, None, AttentionGeometry.bidirectional(6, GRID)).block_mask[0]
    assert torch.equal(mask, torch.eye(6, dtype=torch.bool))


def test_the_meter_counts_dense_calls_as_whole():
    meter = DensityMeter(make("radial"))
    q, k, v = tokens(CACHED)
    assert meter.density == 1.0 and meter.is_static
    found = sparse_attention(q, k, v, CACHED, policy=meter)
    assert torch.equal(found, sparse_attention(q, k, v, CACHED, policy=make("radial")))
    sparse = make("radial").plan(None, None, CACHED).density
    assert meter.density == pytest.approx(sparse)
    sparse_attention(q, k, v, replace(CACHED, layer=0), policy=meter)
    assert meter.density == pytest.approx((1 + sparse) / 2)
    assert (meter.num_calls, meter.num_dense_calls) == (2, 1)


def test_policies_import_no_kernels():
    for path in (ROOT / "attention" / "policies").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "backends" not in text and "dispatch" not in text, path.name
    assert all(issubclass(cls, SparsePolicy) for cls in POLICIES.values())
    assert all(issubclass(POLICIES[name], BlockPolicy) for name in SPARSE)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_block_means_of_any_sizes(sizes):
    """In the way of other devices, which sums in a fixed order, too."""
    edges = torch.tensor([0, *sizes]).cumsum(0)
    x = torch.randn(int(edges[-1]), 2, 4, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([x[a:b].double().mean(0) for a, b in zip(edges, edges[1:], strict=False)])
    for means in (base.block_means(x, edges.int()), base._padded_means(x, edges, edges.diff())):
        assert torch.allclose(means.double(), expected, atol=1e-6)
    half = base.block_means(x.bfloat16(), edges)
    assert half.dtype == torch.float32 and torch.allclose(half, expected.float(), atol=2e-2)


def test_sums_by_group_in_both_ways():
    generator = torch.Generator().manual_seed(0)
    values, group = torch.randn(50, 3, 2, generator=generator), torch.randint(7, (50,), generator=generator)
    expected = torch.stack([values[group == number].sum(0) for number in range(8)])
    for sums in (base.sum_by_group, base._product_sums):
        assert torch.allclose(sums(values, group, 8), expected, atol=1e-6)
