"""What the benchmark of measuring measures; never a time."""

import os

import numpy as np

from benchmarks.evaluation import Case, measure_case, moving_texture


def test_texture_moves_in_pieces():
    pieces = list(moving_texture(32, 48, 20))
    assert [piece.shape for piece in pieces] == [(16, 32, 48, 3), (4, 32, 48, 3)]
    frames = np.concatenate(pieces).astype(int)
    assert (np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3)) > 0).any()


def test_case_is_measured_in_its_own_process(tmp_path):
    before = dict(os.environ)
    case = Case(height=32, width=48, seconds=1, groups=("weight_free",), workers=1)
    record = measure_case(case, tmp_path)
    assert record["num_metrics"] == 25 and record["frames_per_second"] > 0 and record["peak_mb"] > 50
    assert dict(os.environ) == before
