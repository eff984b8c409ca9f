"""Stand-ins without weights: flow finds known motions, features see what they are for and nothing else."""

import importlib.util
import pickle

import numpy as np
import pytest
import torch
from torch.nn import functional

from longtake.evaluation.backbones import classical, classical_backbones
from longtake.evaluation.backbones.classical import _HogHist, _OpenCvDis, _TorchLucasKanade
from longtake.evaluation.preprocessing import dino_transform

HAS_OPENCV = importlib.util.find_spec("cv2") is not None


@pytest.fixture(scope="module")
def texture():
    """(1, 3, 640, 1000) in 0..255 with detail at every scale."""
    generator = torch.Generator().manual_seed(0)
    out = torch.full((1, 3, 640, 1000), 110.0)
    for step, strength in ((4, 15), (8, 20), (16, 30), (40, 40)):
        noise = torch.randn(1, 3, 640 // step + 2, 1000 // step + 2, generator=generator)
        out += strength * functional.interpolate(noise, size=(640, 1000), mode="bicubic", align_corners=False)
    return out.clamp(0, 255).round()


NEAR = 0.05  # pixels: how well the median motion is known


@pytest.fixture(params=[_TorchLucasKanade, _OpenCvDis], ids=lambda kind: kind.name)
def estimator(request):
    if request.param is _OpenCvDis and not HAS_OPENCV:
        pytest.skip("opencv-python-headless is not installed")
    return request.param()


def shifted(texture, dx, dy, height=256, width=256):
    """Two views of the texture; what is at p in the first is at p + (dx, dy) in the second."""
    top, left = 100, 100
    views = [texture[..., top - y : top - y + height, left - x : left - x + width] for x, y in ((0, 0), (dx, dy))]
    return views[0].contiguous(), views[1].contiguous()


@pytest.mark.parametrize("motion", [(0, 0), (1, 0), (0, -2), (3, -2), (8, 4), (-16, 8), (32, 8), (48, 0)])
def test_known_motions_are_found(texture, estimator, motion):
    flow = estimator.flow(*shifted(texture, *motion))
    assert flow.shape == (2, 256, 256) and flow.dtype == torch.float32
    length = sum(part**2 for part in motion) ** 0.5
    median = flow.flatten(1).median(1)[0]
    torch.testing.assert_close(median, torch.tensor(motion, dtype=torch.float32), atol=NEAR, rtol=0)
    # VBench's dynamic degree asks for the strongest 5 %, where what leaves the frame must not run wild.
    strongest = flow.norm(dim=0).flatten().topk(256 * 256 // 20)[0].mean()
    assert abs(strongest - length) <= 0.15 * length + 0.15


def test_full_size_motion(texture, estimator):
    flow = estimator.flow(*shifted(texture, 48, -12, 480, 832))
    error = (flow - torch.tensor([48.0, -12.0]).view(2, 1, 1)).norm(dim=0)
    assert error.median() < NEAR and (error > 1).float().mean() < 0.15


@pytest.mark.parametrize("size", [(64, 64), (75, 91), (131, 97)])
def test_small_and_odd_sizes(texture, estimator, size):
    flow = estimator.flow(*shifted(texture, 3, -2, *size))
    assert flow.shape == (2, *size)
    torch.testing.assert_close(flow.flatten(1).median(1)[0], torch.tensor([3.0, -2.0]), atol=NEAR, rtol=0)


def test_parts_of_a_pixel(texture, estimator):
    """The texture at double size: one pixel there is half a pixel in its means."""
    pair = (functional.avg_pool2d(view, 2) for view in shifted(texture, 1, 0, 256, 512))
    median = estimator.flow(*pair).flatten(1).median(1)[0]
    torch.testing.assert_close(median, torch.tensor([0.5, 0.0]), atol=NEAR, rtol=0)


def test_an_object_moves_and_the_background_stays(texture, estimator):
    a, _ = shifted(texture, 0, 0)
    b = a.clone()
    patch = texture[..., 400:460, 500:560]
    a[..., 100:160, 80:140], b[..., 96:156, 88:148] = patch, patch
    flow = estimator.flow(a, b)
    inside = flow[:, 110:150, 90:130].flatten(1).median(1)[0]
    torch.testing.assert_close(inside, torch.tensor([8.0, -4.0]), atol=0.2, rtol=0)
    assert flow[:, 200:, 180:].abs().max() < 0.1


def test_brightness_and_nothing_to_see_are_no_motion(texture, estimator):
    a, _ = shifted(texture * 0.6 + 20, 0, 0)
    assert estimator.flow(a, a + 25).norm(dim=0).median() < 0.02
    grey = torch.full((1, 3, 64, 64), 128.0)
    assert torch.equal(estimator.flow(grey, grey), torch.zeros(2, 64, 64))


def test_without_a_pyramid_large_motions_are_lost(texture, monkeypatch):
    """The wrong variant: Lucas-Kanade on one level sees a few pixels far."""
    monkeypatch.setattr(classical, "COARSEST_SIDE", 10_000)
    flow = _TorchLucasKanade().flow(*(view[..., :90, :90] for view in shifted(texture, 16, 8)))
    assert (flow.flatten(1).median(1)[0] - torch.tensor([16.0, 8.0])).norm() > 5


def test_flow_does_not_depend_on_threads(texture, estimator):
    views = shifted(texture, 5, 3)
    setters = [(torch.set_num_threads, torch.get_num_threads())]
    if HAS_OPENCV:
        import cv2

        setters.append((cv2.setNumThreads, cv2.getNumThreads()))
    found = []
    try:
        for number in (1, 2):
            for set_number, _ in setters:
                set_number(number)
            found.append(estimator.flow(*views))
    finally:
        for set_number, before in setters:
            set_number(before)
    assert torch.equal(*found)


def test_flow_does_not_depend_on_frames_of_another_size_before_or_on_the_process(texture, estimator):
    views = shifted(texture, 5, 3)
    classical._dis.cache_clear()
    first = estimator.flow(*views)
    classical._dis.cache_clear()
    estimator.flow(*shifted(texture, 1, 0, 24, 32))
    assert torch.equal(estimator.flow(*views), first)
    assert torch.equal(pickle.loads(pickle.dumps(estimator)).flow(*views), first)


def test_wrong_pairs_are_refused(estimator):
    for shapes in (((1, 3, 64, 64), (1, 3, 64, 65)), ((3, 64, 64),) * 2, ((2, 3, 64, 64),) * 2):
        with pytest.raises(ValueError, match=r"give two \(1, 3, height, width\)"):
            estimator.flow(*(torch.zeros(shape) for shape in shapes))
    if isinstance(estimator, _OpenCvDis):
        with pytest.raises(ValueError, match="too small for flow 'opencv_dis': use 16 pixels"):
            estimator.flow(torch.zeros(1, 3, 15, 64), torch.zeros(1, 3, 15, 64))


def test_without_opencv_the_name_says_so(monkeypatch):
    names = {"dino": "hog+hist", "raft": "opencv_dis" if HAS_OPENCV else "torch_lk", "amt": "linear_blend"}
    assert classical_backbones().names == names
    monkeypatch.setattr(classical.importlib.util, "find_spec", lambda name: None)
    assert classical_backbones().names == names | {"raft": "torch_lk"}
    with pytest.raises(ValueError, match=r"needs the package opencv-python-headless \(not installed\): pip install"):
        _OpenCvDis()
    assert not any(classical_backbones().get(role).official for role in names)


def cosine(first, second):
    return float(functional.cosine_similarity(*(_HogHist().encode(dino_transform(f[None])) for f in (first, second))))


@pytest.fixture(scope="module")
def scene(texture):
    return texture[0, :, :192, :256].permute(1, 2, 0).byte().numpy()


def test_features_see_colour_layout_and_edges(scene):
    assert cosine(scene, scene) == pytest.approx(1.0, abs=1e-6)
    near = cosine(scene, np.clip(scene.astype(int) + 1, 0, 255).astype(np.uint8))
    others = {"other colours": scene[..., ::-1].copy(), "upside down": scene[::-1].copy(), "negative": 255 - scene}
    assert near > 0.97 and all(cosine(scene, other) < 0.9 for other in others.values())


def test_gradients_go_to_their_orientation_and_cell():
    """A vertical edge in the left half: one orientation, in two columns of cells."""
    images = torch.zeros(1, 3, 64, 64)
    images[..., 12:] = 1.0
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    cells = _HogHist().encode((images - mean) / std)[0, 48 + 48 :].view(9, 8, 8)
    strong = cells > 1e-3
    assert strong.any(dim=(1, 2)).nonzero().flatten().tolist() == [0]
    assert strong.any(dim=(0, 1)).nonzero().flatten().tolist() == [1]


def test_features_are_never_empty_and_frames_do_not_mix(scene):
    black = np.zeros((64, 64, 3), np.uint8)
    assert cosine(black, black) == pytest.approx(1.0, abs=1e-6)
    frames = dino_transform(np.stack([scene, scene[::-1], 255 - scene]))
    encoder = _HogHist()
    whole = encoder.encode(frames)
    assert whole.shape == (3, 672) and whole.dtype == torch.float32
    assert torch.equal(whole, torch.cat([encoder.encode(frame[None]) for frame in frames]))
    with pytest.raises(ValueError, match="height, width"):
        encoder.encode(frames[0])
