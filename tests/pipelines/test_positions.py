"""Positions in use against those of training."""

import json
import logging

import pytest
import torch

from longtake.pipelines.long_video import _PositionUse

PROMPT = "a red circle moving left over a navy plain background"


def test_warns_once_when_a_read_leaves_the_trained_range(caplog):
    use = _PositionUse("some", 21)
    with caplog.at_level(logging.WARNING):
        for highest in (2, 20):
            use.see((0.0, float(highest)))
        use.see((1000.0, 1020.0))
        use.see(None)
        assert caplog.records == []
        use.see((3.0, 24.0))
        use.see((3.0, 45.0))
    (record,) = caplog.records
    assert "'some' reads positions 21 apart" in record.message and "21 latent frames" in record.message
    assert use.as_mapping() == {
        "lowest": 3.0,
        "highest": 45.0,
        "largest_distance": 42.0,
        "trained_distance": 20,
    }


def test_goes_on_without_a_second_warning(caplog):
    first, second = _PositionUse("some", 5), _PositionUse("some", 5)
    first.see((0.0, 9.0))
    second.load(json.loads(json.dumps(first.as_mapping())))
    caplog.clear()
    second.see((0.0, 12.0))
    assert caplog.records == [] and second.reach == 12.0
    fresh = _PositionUse("some", 5)
    fresh.load(_PositionUse("some", 5).as_mapping())
    assert fresh.last is None


@pytest.mark.parametrize(
    ("positions", "expected"), [("contiguous", (0.0, 8.0, 8.0, False)), ("absolute", (0.0, 11.0, 11.0, True))]
)
def test_a_take_reports_its_policys_reach(tiny_pipe, caplog, positions, expected):
    tiny_pipe.family = type(tiny_pipe.family)(**{**vars(tiny_pipe.family), "num_trained_frames": 10})
    cache = {"policy": "attention_sink", "num_context_frames": 9, "num_sink_frames": 3, "positions": positions}
    session = tiny_pipe.start(PROMPT, num_frames=45, cache=cache, decode=False)
    assert torch.cat([chunk.latents for chunk in session], 1).shape[1] == 12
    use = session.positions.as_mapping()
    assert (use["lowest"], use["highest"], use["largest_distance"], bool(caplog.records)) == expected
    assert session.state_dict()[1]["positions"] == use
