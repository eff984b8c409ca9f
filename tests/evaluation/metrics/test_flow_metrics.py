"""Flow metrics on known shifts, with an estimator that knows the answer and with those that ship."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from vbench_stubs import scores

from longtake.evaluation.backbones import classical_backbones
from longtake.evaluation.backbones.classical import _TorchLucasKanade
from longtake.evaluation.metrics.motion import FLOW_SPECS, FlowMetric, _warp_error


@dataclass
class Known:
    """Says the same flow for every pair; the way back is its opposite."""

    x: float
    y: float = 0.0
    name: str = "known"
    weights_sha256: str | None = None
    official: bool = False
    sizes: tuple = ()

    def flow(self, a, b):
        self.sizes = (*self.sizes, tuple(a.shape))
        sign = 1.0 if len(self.sizes) % 2 else -1.0
        height, width = a.shape[-2:]
        return sign * torch.tensor([self.x, self.y]).view(2, 1, 1).expand(2, height, width)


def texture(height=64, width=400, seed=0):
    rng = np.random.default_rng(seed)
    rough = rng.uniform(0, 255, (height + 8, width + 8, 3))
    for _ in range(3):
        rough = (rough + np.roll(rough, 1, 0) + np.roll(rough, 1, 1) + np.roll(rough, (1, 1), (0, 1))) / 4
    rough = (rough - rough.mean()) * 3 + 128
    return rough[8:, 8:].clip(0, 255).astype(np.uint8)


def panned(num_frames, step, width=80, **options):
    wide = texture(**options)
    return np.stack([wide[:, step * index : step * index + width] for index in range(num_frames)])


def measured(video, estimator, fps=16.0):
    metric = FlowMetric(estimator)
    found = scores([metric], video, range(5, len(video), 5), fps=fps)
    assert list(found) == [spec.name for spec in metric.specs]
    assert list(found) == [f"{spec.name}[flow={estimator.name}]" for spec in FLOW_SPECS]
    return {name.removeprefix("proxy/").partition("[")[0]: score for name, score in found.items()}


def tensor(frame):
    return torch.from_numpy(frame).permute(2, 0, 1)[None].float()


@pytest.mark.parametrize(
    ("fps", "pixels"), [(8.0, 4.0), (16.0, 4.0), (24.0, 4.0), (12.0, 4.0 * 12 / 16), (20.0, 4.0 * 20 / 16)]
)
def test_lengths_are_per_eighth_of_a_second(fps, pixels):
    found = measured(panned(24, 2), Known(4.0), fps)
    assert found["flow_magnitude_mean"].value == pytest.approx(pixels)
    assert found["flow_magnitude_top5"].value == pytest.approx(pixels)
    assert found["flow_magnitude_mean"].details["percent_of_short_side"] == pytest.approx(100 * pixels / 64)


def test_lengths_are_in_pixels_of_the_original_and_the_fastest_have_a_mean_of_their_own():
    class Corner(Known):
        def flow(self, a, b):
            field = super().flow(a, b).abs()
            field[0, :, : a.shape[-1] // 20] += 7.0  # 5 % of the picture
            return field

    estimator = Corner(4.0)
    found = measured(np.zeros((6, 330, 480, 3), dtype=np.uint8), estimator)
    assert found["flow_magnitude_mean"].value == pytest.approx(2 * (4.0 + 0.05 * 7.0))
    assert found["flow_magnitude_top5"].value == pytest.approx(2 * 11.0)
    assert set(estimator.sizes) == {(1, 3, 168, 240)}, "half the size, padded to multiples of 8"


@pytest.mark.parametrize("estimator", [_TorchLucasKanade(), classical_backbones().get("raft")], ids=lambda e: e.name)
def test_panned_texture(estimator):
    found = measured(panned(40, 2), estimator)
    assert found["flow_magnitude_mean"].value == pytest.approx(4.0, rel=0.15)
    plain = np.abs(np.diff(panned(40, 2)[::2].astype(float), axis=0)).mean()
    assert found["warp_error"].value < 0.2 * plain
    assert found["motion_kept"].value == pytest.approx(1.0, abs=0.1)


def test_warp_error_of_the_true_flow_is_that_of_rounding():
    first, second = (tensor(frame) for frame in panned(2, 5))
    there = torch.tensor([-5.0, 0.0]).view(2, 1, 1).repeat(1, 64, 80)
    assert _warp_error(first, second, there, -there) < 1e-3
    assert _warp_error(first, second, -there, there) > 10.0, "the sign matters"
    second[..., 20:40, 20:40] = 255.0  # something new covers it
    back = -there.clone()
    all_seen = _warp_error(first, second, there, back)
    back[:, 20:40, 20:40] = 0.0
    assert _warp_error(first, second, there, back) < 1e-3 < all_seen, "what is not found again is left out"


def test_warp_error_falls_back_to_the_plain_difference():
    first, second = torch.full((1, 3, 20, 20), 10.0), torch.full((1, 3, 20, 20), 40.0)
    for flow in (torch.full((2, 20, 20), 500.0), torch.zeros(2, 20, 20)):  # flicker is not explained by motion
        assert _warp_error(first, second, flow, flow) == pytest.approx(30.0)


def test_motion_kept_of_a_video_that_slows_down_and_reasons():
    places = np.concatenate([2 * np.arange(80), 160 + np.arange(80)])
    wide = texture()
    video = np.stack([wide[:, place : place + 80] for place in places])
    found = measured(video, _TorchLucasKanade())
    assert found["motion_kept"].value == pytest.approx(0.5, abs=0.08)
    still = np.repeat(video[:1], 40, axis=0)
    assert "nothing moves" in measured(still, _TorchLucasKanade())["motion_kept"].skipped
    found = measured(np.zeros((20, 12, 40, 3), dtype=np.uint8), Known(1.0))
    assert all("16 pixels" in score.skipped for score in found.values())
