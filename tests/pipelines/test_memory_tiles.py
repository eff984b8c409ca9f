"""The memory plan of a decode in tiles, against what the tiled decoder was counted to take at the real size."""

import pytest
import torch

from longtake.configs.families import load_family
from longtake.pipelines.memory_trace import trace_decode, trace_tiled_decode
from longtake.pipelines.model_shapes import shapes_of

LATENTS = (1, 16, 3, 60, 104)  # a block of Wan2.1 at 832x480
COUNTED = {"device": 0.65 * 2**30, "host": 2.91 * 2**30}  # docs/models.md, TiledDecoder on shapes


@pytest.fixture(scope="module")
def vae():
    return shapes_of(load_family("self_forcing"), None).configs["vae"]


def test_tiles_take_what_was_counted(vae):
    tiled = trace_tiled_decode(vae, LATENTS, dtype=torch.bfloat16, device_type="cuda")
    assert tiled.features + tiled.activations == pytest.approx(COUNTED["device"], rel=0.1)
    assert tiled.features + tiled.resting == pytest.approx(COUNTED["host"], rel=0.05)


def test_whole_frames_are_another_figure(vae):
    whole = trace_decode(vae, LATENTS, dtype=torch.bfloat16, device_type="cuda")
    assert whole.resting == 0 and whole.features + whole.activations > 4 * COUNTED["device"]


def test_on_the_cpu_all_tiles_lie_in_one_memory(vae):
    there, here = (trace_tiled_decode(vae, LATENTS, dtype=torch.bfloat16, device_type=d) for d in ("cuda", "cpu"))
    assert here.resting == 0 and here.features == pytest.approx(there.features + there.resting, rel=0.05)


def test_a_frame_no_larger_than_a_tile_is_one_tile(vae):
    small = (1, 16, 3, 30, 32)
    tiled = trace_tiled_decode(vae, small, dtype=torch.bfloat16, device_type="cuda")
    assert tiled.resting == 0
    assert tiled.features == trace_decode(vae, small, dtype=torch.bfloat16, device_type="cuda").features
