"""Positions in use against those of training."""

import logging

import pytest
from rollouts import PROMPT, SINK


@pytest.mark.parametrize(("positions", "highest", "num_warnings"), [("contiguous", 8.0, 0), ("absolute", 11.0, 1)])
def test_a_video_warns_once_when_it_reads_beyond_what_was_trained(tiny_pipe, caplog, positions, highest, num_warnings):
    """Twelve frames of a model that was trained on ten; a resumed video does not warn again."""
    tiny_pipe.family = type(tiny_pipe.family)(**{**vars(tiny_pipe.family), "num_trained_frames": 10})
    settings = {"num_frames": 57, "cache": SINK | {"positions": positions}, "decode": False}
    session, resumed = (tiny_pipe.start(PROMPT, **settings) for _ in range(2))
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            session.next_block()
    expected = {"lowest": 0.0, "highest": highest, "largest_distance": highest, "trained_distance": 9}
    assert session.positions.as_mapping() == expected
    tensors, numbers = session.state_dict()
    assert numbers["positions"] == expected
    assert len(caplog.records) == num_warnings
    if num_warnings:
        assert "'attention_sink' reads positions 11 apart" in caplog.text and "10 latent frames" in caplog.text
    resumed.load_state_dict(tensors, numbers)
    resumed.next_block()
    assert len(caplog.records) == num_warnings
    assert resumed.positions.reach == (14.0 if num_warnings else 8.0)
