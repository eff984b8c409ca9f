"""The table of policies: columns, references, pairing and costs, on made-up results."""

import numpy as np
import pytest

from longtake.evaluation.intervals import ratio_by_prompt
from longtake.evaluation.mini_world.drift import ACCURACIES, MEASURES
from longtake.evaluation.mini_world.drift_study import CostMeter, VideoResult
from longtake.evaluation.mini_world.policy_table import COLUMNS, difference, level, policy_tables, values_at, window_of


def made_up(policy, *, slope, num_windows=12, prompts=16, kv=10.0):
    rng = np.random.default_rng(0)
    results = []
    for prompt in range(prompts):
        for seed in range(2):
            windows = []
            for window in range(num_windows):
                row = dict.fromkeys(MEASURES, 1.0)
                row["shape"] = float(prompt % 2)
                row["background_psnr"] = np.nan if window == 0 else 30.0 + slope * window + rng.normal()
                row["motion_magnitude"] = (1.0 + 0.05 * prompt) * (1.0 + 0.05 * slope * window)
                windows.append(row | {"ms_per_block": 7.0 + window, "kv_mb": kv})
            results.append(
                VideoResult(
                    policy=policy,
                    prompt_index=prompt,
                    seed_index=seed,
                    prompt="p",
                    fingerprint="f",
                    windows=tuple(windows),
                )
            )
    return results


WINDOW, SINK, FULL = (
    made_up("window", slope=-1.0),
    made_up("sink", slope=0.0),
    made_up("full", slope=0.0, num_windows=6),
)


def test_levels_are_of_the_window_that_ends_at_the_moment():
    assert [window_of(s) for s in (5, 30, 60, 120)] == [0, 5, 11, 23]
    with pytest.raises(ValueError, match="multiple of 5"):
        window_of(7)
    assert level(WINDOW, "background_psnr", 11).mean == pytest.approx(19.0, abs=0.5)
    assert level(WINDOW, "ms_per_block", 11).mean == 18.0
    assert level(WINDOW, "background_psnr", 0).num_prompts == 0
    judge = values_at(WINDOW, "judge", 3)
    assert judge[0, 0] == pytest.approx((len(ACCURACIES) - 1) / len(ACCURACIES)) and judge[1, 0] == 1.0


def test_motion_kept_is_relative_to_the_first_window():
    assert level(SINK, "motion_kept", 11).mean == pytest.approx(1.0)
    assert level(WINDOW, "motion_kept", 11).mean == pytest.approx(1 - 0.55)
    same = ratio_by_prompt({(0, 0): 2.0, (1, 0): 4.0}, {(0, 0): 0.0, (1, 0): 3.0})
    assert same.mean == 2.0 and same.num_prompts == 2
    assert ratio_by_prompt({}, {}).num_prompts == 0
    assert np.isnan(ratio_by_prompt({(0, 0): 1.0}, {(0, 0): 2.0}).low)


def test_differences_are_paired_and_only_on_common_videos():
    row = difference(SINK, WINDOW, "background_psnr", 11)
    assert row.mean == pytest.approx(11.0, abs=0.5) and row.excludes_zero and row.num_prompts == 16
    assert difference(SINK[:8], WINDOW, "background_psnr", 11).num_prompts == 4
    assert not difference(SINK, WINDOW, "shape", 11).excludes_zero


def test_tables_have_a_row_per_policy_that_got_so_far():
    text = policy_tables(
        [*WINDOW, *SINK, *FULL], moments=(5, 30, 60, 120), baseline="window", levels={"true scene": {"shape": 0.99}}
    )
    assert "### At 5 s" in text and "### At 60 s" in text and "### At 120 s" not in text
    at_30, at_60 = text.split("### At ")[2:4]
    assert "| full | 32 |" in at_30 and "| full | 32 |" not in at_60
    head = at_60.splitlines()[2]
    assert [title.strip() for title in head.strip("|").split("|")] == ["policy", "videos", *COLUMNS.values()]
    sink = next(line for line in at_60.splitlines() if line.startswith("| sink | 32 |"))
    assert sink.endswith("| 18 | 10 |") and all(line.count("|") == 16 for line in (head, sink))
    against = at_60.split("Minus `window`")[1]
    assert "| window |" not in against and "**+" in against and "| _true scene_ |" in at_60
    with pytest.raises(ValueError, match="choose one of window, sink"):
        policy_tables([*WINDOW, *SINK], moments=(5,), baseline="none")


def test_results_without_costs_still_make_a_table():
    old = [
        VideoResult(**{**vars(row), "windows": tuple({k: w[k] for k in MEASURES} for w in row.windows)})
        for row in SINK
    ]
    assert "| sink | 32 |" in policy_tables(old, moments=(60,), baseline="sink")


def test_costs_belong_to_the_window_in_which_a_block_ends():
    meter = CostMeter()
    for index in range(8):
        meter.add(num_frames=9 if index == 0 else 12, seconds=0.001 * (index + 1), num_bytes=1e6 * index)
    rows = meter.take(2)  # blocks end at frames 9, 21, ..., 93; windows at 80 and 160
    assert rows[0] == {"ms_per_block": pytest.approx(3.5), "kv_mb": 5.0}
    assert rows[1] == {"ms_per_block": pytest.approx(7.5), "kv_mb": 7.0}
    assert np.isnan(meter.take(1)[0]["kv_mb"])
