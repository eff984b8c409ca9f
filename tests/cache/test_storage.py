"""Cost and loss of tokens: codecs, buffers, and the policies that wrap a policy."""

import logging
from dataclasses import replace

import pytest
import torch
from policy_driver import Player, make_geometry, spans, wan_geometry

from longtake.cache import Pass, Storage, make_policy
from longtake.cache.footprint import footprint
from longtake.cache.storage import Raw
from longtake.cache.wrappers.quantized import _Int4, _Int8
from longtake.rope import axis_frequencies, rotate

SINK = {"policy": "attention_sink", "num_context_frames": 12, "num_sink_frames": 3}
CODECS = [Raw(), _Int8(), _Int4(16), _Int4(32)]


def tokens(*shape, seed=0):
    """Keys as a transformer makes them: channels of very different size, some with an offset."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    return x * torch.linspace(0.5, 2.0, shape[-1]) + torch.linspace(-0.5, 0.5, shape[-1])


def error(found, wanted):
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def coded(codec, x):
    planes = codec.encode(x)
    declared = codec.planes(x.shape[-1], x.dtype)
    assert {name: (plane.shape[-1], plane.dtype) for name, plane in planes.items()} == declared
    return codec.decode(planes, x.dtype)


@pytest.mark.parametrize(("codec", "most"), [(Raw(), 0.0), (_Int8(), 0.01), (_Int4(16), 0.12), (_Int4(32), 0.13)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.05, 1.0, 40.0])
def test_error_of_a_codec(codec, most, dtype, scale):
    x = (scale * tokens(2, 50, 3, 128)).to(dtype)
    assert error(coded(codec, x), x) <= most
    if most:
        assert error(coded(codec, x), x) > most / 10, "a codec that loses nothing is none"


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("head_dim", [6, 16, 24, 32, 128])
def test_a_token_is_encoded_by_itself(codec, head_dim):
    """Neither its neighbours nor its batch have a say, and encoding what was decoded changes nothing more."""
    x = tokens(2, 9, 3, head_dim)
    whole = coded(codec, x)
    assert torch.equal(coded(codec, x[1:, 4:5, 2:]), whole[1:, 4:5, 2:])
    assert torch.allclose(coded(codec, whole), whole, rtol=1e-3, atol=1e-6)
    zero = torch.zeros(1, 1, 1, head_dim)
    assert torch.equal(coded(codec, zero), zero)


@pytest.mark.parametrize("position", [0, 1.5, 20, 1023, 1024, 10_000, 60_000])
def test_unrotated_storage_is_as_exact_at_any_position(position):
    """Stored in bfloat16 and rotated once: below 2e-3 of the exact key, wherever it stands."""
    keys = tokens(1, 64, 12, 128)
    where = torch.tensor([float(position), 3.0, 7.0], dtype=torch.float64).expand(64, 3)
    frequencies = axis_frequencies(128)
    exact = rotate(keys.double().float(), where, frequencies=frequencies)
    stored = rotate(keys.to(torch.bfloat16).float(), where, frequencies=frequencies)
    assert error(stored, exact) < 2e-3
    assert error(stored.to(torch.bfloat16), exact) < 3e-3  # once more, as attention in bfloat16 reads it


def test_phase_updates_in_place_would_not_be():
    """The same key turned by three frames 400 times in bfloat16 has lost its place: why nothing here does so."""
    keys = tokens(1, 64, 12, 128).to(torch.bfloat16)
    step = torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64).expand(64, 3)
    turned = keys
    for _ in range(400):
        turned = rotate(turned, step, frequencies=axis_frequencies(128))
    assert error(turned, rotate(keys.float(), 400 * step, frequencies=axis_frequencies(128))) > 0.05


@pytest.mark.parametrize("codec", CODECS)
def test_a_buffer_moves_saves_and_loads_codes(codec):
    geometry = make_geometry(3, batch=2)
    storage = Storage(codec, codec)
    buffer, other = (storage.buffer(geometry, 8, num_heads=1) for _ in range(2))
    k, v = tokens(2, 8, 1, 16), tokens(2, 8, 1, 16, seed=1)
    buffer.write(1, 0, k, v)
    before = buffer.read(1, 0, 8)
    keys, values = before.keys.clone(), before.values.clone()
    buffer.move(1, torch.tensor([[5, 6], [7, 1]]), 0)
    assert torch.equal(buffer.read(1, 0, 2).keys, torch.stack([keys[0, [5, 6]], keys[1, [7, 1]]]))
    buffer.move(1, torch.tensor([3, 2]), 1)
    assert torch.equal(buffer.read(1, 1, 3).values, torch.stack([values[0, [3, 2]], values[1, [3, 2]]]))
    buffer.grow(20)
    other.grow(20)
    other.load(1, 12, buffer.save(1, 0, 8))
    assert torch.equal(other.read(1, 12, 20).keys, buffer.read(1, 0, 8).keys)
    assert torch.equal(other.read(1, 12, 20).values, buffer.read(1, 0, 8).values)
    assert sum(plane.nbytes for plane in buffer.save(1, 0, 20).values()) * geometry.num_layers == (
        20 * buffer.bytes_per_token
    )
    with pytest.raises(ValueError, match="saved keys"):
        other.load(1, 0, {name: plane[:1] for name, plane in buffer.save(1, 0, 8).items()})
    with pytest.raises(ValueError, match="missing"):
        other.load(1, 0, {})


def test_plain_and_offloaded_states_are_interchangeable():
    plain, far = (Storage().buffer(make_geometry(3), 4), Storage(is_on_host=True).buffer(make_geometry(3), 4))
    plain.write(0, 0, tokens(1, 4, 2, 16), tokens(1, 4, 2, 16, seed=1))
    far.load(0, 0, plain.save(0, 0, 4))
    assert torch.equal(far.read(0, 0, 4).keys, plain.read(0, 0, 4).keys)


@pytest.mark.parametrize(
    ("settings", "most"),
    [({"bits": 8}, 0.52), ({"bits": 4}, 0.32), ({"bits": 8, "value_bits": 4}, 0.42), ({"bits": 16}, 1.0)],
)
@pytest.mark.parametrize("inner", [SINK, "deep_forcing", "full"])
def test_bytes_of_quantized_storage(settings, most, inner):
    """Against bfloat16, at the 1.3B model's size, from ``stats``."""
    geometry = wan_geometry(num_layers=2)
    sizes = []
    for policy in (inner, {"policy": "quantized", "inner": inner, **settings}):
        player = Player(policy, geometry, content=_empty, attends=False)
        for span in spans(9, 3):
            player.block(span, steps=1)
        sizes.append(player.cache.stats().num_bytes)
    assert 0.9 * most < sizes[1] / sizes[0] <= most


def _empty(layer, pass_, geometry, samples):
    shape = (len(samples), pass_.num_frames * geometry.tokens_per_frame, geometry.num_heads, geometry.head_dim)
    return torch.empty((3, *shape), dtype=geometry.dtype, device="meta").unbind(0)


def outputs(policy, *, num_blocks=9, **changes):
    player = Player(policy, make_geometry(3, batch=2, **changes), samples=(0, 1))
    return torch.cat([torch.cat(player.block(span), 1) for span in spans(num_blocks, 3)], dim=1), player


def test_attention_over_quantized_tokens_is_close_and_ordered():
    plain = outputs(SINK)[0]
    errors = {
        bits: error(outputs({"policy": "quantized", "inner": SINK, "bits": bits})[0], plain) for bits in (16, 8, 4)
    }
    assert errors[16] == 0 and 0 < errors[8] < 0.01 < errors[4] < 0.2


@pytest.mark.parametrize(
    "policy",
    [
        {"policy": "offloaded", "inner": {"policy": "quantized", "inner": SINK}},
        {"policy": "quantized", "inner": {"policy": "offloaded", "inner": SINK}},
        {"policy": "budget", "inner": {"policy": "offloaded", "inner": {"policy": "quantized", "inner": SINK}}},
    ],
)
def test_wrappers_compose_in_any_order(policy):
    expected = outputs({"policy": "quantized", "inner": SINK})[0]
    found, player = outputs(policy)
    assert torch.equal(found, expected)
    assert make_policy(player.cache.policy.settings()) == make_policy(policy)


def test_read_sets_of_encoded_tokens_share_one_buffer():
    """Otherwise the decoded copies of all layers would outweigh what the codes save."""
    few, many = (
        outputs({"policy": "quantized", "inner": SINK}, layers=layers)[1].cache.num_scratch_bytes for layers in (1, 5)
    )
    assert few == many
    plain = [outputs(SINK, layers=layers)[1].cache.num_scratch_bytes for layers in (1, 5)]
    assert plain[1] == 5 * plain[0]


def test_only_the_footprint_that_was_foretold():
    for policy in (SINK, "deep_forcing", {"policy": "quantized", "inner": SINK}):
        _, player = outputs(policy, num_blocks=14)
        cache = player.cache
        foretold = footprint(cache.policy, player.geometry).budgeted
        assert cache.stats().num_bytes + cache.num_scratch_bytes <= foretold
        assert cache.stats().num_bytes + cache.num_scratch_bytes >= 0.7 * foretold


@pytest.mark.parametrize(
    ("max_bytes", "min_bits", "bits", "window"),
    [("12GB", 8, None, 21), ("4GB", 8, 8, 21), ("2GB", 8, 8, 15), ("2GB", 4, 4, 21), ("6GB", 16, None, 11)],
)
def test_budget_gives_up_bits_first_then_frames(max_bytes, min_bits, bits, window, caplog):
    geometry = wan_geometry()
    inner = {"policy": "sliding_window", "num_context_frames": 21}
    budget = make_policy({"policy": "budget", "inner": inner, "max_bytes": max_bytes, "min_bits": min_bits})
    with caplog.at_level(logging.INFO, logger="longtake"):
        chosen = budget.choose(geometry)
    assert footprint(chosen, geometry).budgeted <= budget.num_bytes
    assert getattr(chosen, "bits", None) == bits
    frames = getattr(chosen, "inner", chosen).num_context_frames
    assert frames == window
    assert f"max_bytes={max_bytes}" in caplog.text and f"'num_context_frames': {frames}" in caplog.text
    assert (caplog.records[0].levelno == logging.WARNING) is (bits is not None or frames < 21)
    if frames < 21:
        inner = replace(getattr(chosen, "inner", chosen), num_context_frames=frames + 1)
        longer = replace(chosen, inner=inner) if bits else inner
        assert footprint(longer, geometry).budgeted > budget.num_bytes, "a longer window would have fitted"


def test_budget_too_small_for_anything():
    budget = make_policy({"policy": "budget", "inner": SINK, "max_bytes": "10MB"})
    with pytest.raises(ValueError, match="max_bytes='10MB' is too little .* the least it takes is"):
        budget.start(wan_geometry(num_layers=4))
    growing = make_policy({"policy": "budget", "inner": "full", "max_bytes": 1000})
    with pytest.raises(ValueError, match="grows with the video"):
        growing.start(make_geometry(3))
    assert growing.num_bytes == 1000
    growing = make_policy({"policy": "budget", "inner": "full", "max_bytes": "100KB"})
    assert growing.choose(make_geometry(3, max_frames=60)).bits == 8


def test_commit_passes_read_recent_frames_only():
    policy = {"policy": "commit_reads", "inner": SINK, "num_recent_frames": 2}
    player = Player(policy, make_geometry(3))
    for span in spans(7, 3):
        player.block(span)
    state = player.cache.state
    frames = {
        kind: [f for read in state.select(0, Pass(kind, 7, 21, 3)).reads for f in read.frames]
        for kind in ("denoise", "commit")
    }
    assert frames == {"denoise": [0, 1, 2, *range(15, 21)], "commit": [19, 20]}
    for number, same in ((0, False), (20, True)):
        policy = {"policy": "commit_reads", "inner": "full", "num_recent_frames": number}
        assert torch.equal(outputs(policy, num_blocks=4)[0], outputs("full", num_blocks=4)[0]) is same


def test_a_policy_twice_encoded_is_refused():
    twice = make_policy({"policy": "quantized", "inner": {"policy": "quantized", "inner": SINK}})
    with pytest.raises(ValueError, match="inside another one"):
        twice.start(make_geometry(3))
