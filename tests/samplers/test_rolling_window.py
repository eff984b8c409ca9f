"""One forward of a rolling window, and its settings."""

import pytest
import torch

from longtake.samplers import make_sampler, rolling_window

SIGMAS = (1.0, 0.75, 0.5)


def test_every_block_goes_to_its_next_level_and_the_last_level_is_clean():
    blocks = [torch.full((1, 3, 2, 2, 2), float(value)) for value in (1, 2, 3)]
    seen = []

    def denoise(parts, timesteps):
        seen.append(timesteps)
        return [10 * part for part in parts]

    clean, half, noisy = rolling_window(
        denoise, blocks, levels=(2, 1, 0), sigmas=SIGMAS, renoise=lambda place: torch.full_like(blocks[place], place)
    )
    assert seen == [[500.0, 750.0, 1000.0]]
    assert torch.equal(clean, 10 * blocks[0])
    assert torch.allclose(half, 0.5 * 20 * torch.ones(()) + 0.5 * 1)
    assert torch.allclose(noisy, torch.tensor(0.25 * 30 + 0.75 * 2))


def test_the_window_holds_one_block_per_level():
    sampler = make_sampler("rolling_window")
    assert sampler.num_window_blocks == sampler.num_steps(7) == 5
    warped = [1000 * sigma for sigma in sampler.sigmas]
    assert warped == pytest.approx([1000, 952.3810, 882.3529, 769.2308, 555.5556], abs=1e-3)
    assert make_sampler("few_step").num_window_blocks == 1
    assert make_sampler(sampler.settings()) == sampler


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timesteps": [500, 1000]}, "must fall"),
        ({"flow_shift": 0}, "flow_shift=0"),
        ({"guidance_scale": -1}, "guidance_scale=-1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_sampler({"name": "rolling_window"} | settings)
