"""The table of storages: what it compares, and when it says that accuracy is kept."""

import pytest

from longtake.cache import make_policy
from longtake.configs.loader import load_preset
from longtake.evaluation.mini_world.drift import ACCURACIES, MEASURES
from longtake.evaluation.mini_world.drift_study import VideoResult
from longtake.scripts.compare_storage import judge_accuracy, report, storages


def videos(policy, wrong):
    """Thirty-two prompts of two windows; in ``wrong`` of them one answer of twelve is wrong."""
    rows = []
    for prompt in range(32):
        windows = [dict.fromkeys(MEASURES, 1.0) for _ in range(2)]
        windows[1][ACCURACIES[0]] = float(prompt >= wrong)
        values = {"prompt_index": prompt, "seed_index": 0, "prompt": "", "fingerprint": "f"}
        rows.append(VideoResult(policy=policy, windows=tuple(windows), **values))
    return rows


def test_accuracy_is_the_mean_over_questions_and_windows():
    accuracy = judge_accuracy(videos("plain", 1))
    assert accuracy[0, 0] == pytest.approx(11 / 12) and accuracy[1, 0] == 1


def test_the_verdict_is_a_point_of_accuracy():
    policies = storages(load_preset("cache", "attention_sink"))
    for cache in policies.values():
        make_policy(cache)
    rows = videos("plain", 2) + videos("int8", 4) + videos("int4", 20)
    table = report(rows, policies)
    cells = {name: list(column.cells) for name, column in zip("svjdwb", table.columns, strict=True)}
    assert cells["s"] == ["plain", "int8", "int4"] and cells["v"] == ["32"] * 3
    assert cells["w"] == ["-", "yes", "no"]
    assert cells["d"][1].startswith("-0.52 [")
    assert cells["b"] == ["1.000x", "0.508x", "0.312x"]
