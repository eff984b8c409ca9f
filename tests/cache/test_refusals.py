"""Settings that do not fit: every error names the value, the limit and the remedy, before any work."""

from dataclasses import fields
from typing import Literal, get_origin

import pytest

from longtake.cache import POLICIES, make_policy

SINK = {"policy": "attention_sink", "num_context_frames": 5}

# Policy, its settings, frames per block, message.
REFUSED = [
    ("anchor", {"num_context_frames": 9}, 3, "use 10 or more"),
    ("anchor", {"num_position_frames": 17}, 3, "num_position_frames=17 leaves no room"),
    ("anchor", {"num_refresh_blocks": -1}, 3, "num_refresh_blocks=-1 must be 0 or more"),
    ("budget", {"max_bytes": "4 pounds"}, 3, "max_bytes='4 pounds' is no size"),
    ("budget", {"max_bytes": 0}, 3, "must be 1 or more"),
    ("budget", {"max_bytes": [1]}, 3, "max_bytes of cache policy 'budget'"),
    ("budget", {"min_bits": 2}, 3, "min_bits=2 has no codec"),
    ("commit_reads", {"num_recent_frames": -1}, 3, "num_recent_frames=-1"),
    ("deep_forcing", {"num_budget_frames": 22}, 3, "num_budget_frames=22 .* use 21 or fewer"),
    ("deep_forcing", {"num_sink_frames": 18}, 3, "=21 leaves no room for num_sink_frames=18 .* use 22 or more"),
    ("deep_forcing", {}, 5, "num_recent_frames=4 counts the block itself.* use 5 or more"),
    ("deep_forcing", {"compression": "none", "num_sink_frames": 19}, 3, "=19 and a block of 3 frames: use 22 or more"),
    ("deep_forcing", {"max_reuse": -1}, 3, "max_reuse=-1 must be 0 or more"),
    ("dilated_window", {"num_context_frames": 9}, 4, "use 10 or more"),
    ("dilated_window", {"dilation": 0}, 3, "dilation=0"),
    ("ema_sink", {"num_context_frames": 5}, 3, "use 6 or more"),
    ("ema_sink", {"alpha": 1.5}, 3, "alpha=1.5"),
    ("ema_sink", {"num_sink_frames": 0}, 3, "use sliding_window"),
    ("forcing_kv", {"num_dynamic_frames": 4}, 3, "num_dynamic_frames=4 .* use 3 or fewer"),
    ("forcing_kv", {"head_map": ""}, 3, "needs a head_map or heads.*profile-heads"),
    ("infinity_rope", {"num_flush_frames": -1}, 3, "num_flush_frames=-1 must be 0 or more"),
    ("longlive", {"num_context_frames": 5}, 3, "use 6 or more"),
    ("memrope", {"num_context_frames": 8}, 4, "use 9 or more"),
    ("memrope", {"short_rate": 0.0}, 3, "short_rate=0.0"),
    ("pack", {"compressor": "hr"}, 3, "needs compressor_weights"),
    ("pack", {"num_archive_blocks": 3}, 3, "use 16 or more"),
    ("pack", {"num_selected_blocks": 0}, 3, "num_selected_blocks=0 must be 1 or more"),
    ("pack", {"num_sink_frames": -1}, 3, "num_sink_frames=-1"),
    ("pack", {"mid_span": 0.0}, 3, "mid_span"),
    ("pack", {"cell": (0, 4, 4)}, 3, "cell"),
    ("pack", {"num_scored_heads": 0}, 3, "num_scored_heads"),
    ("pack", {"compresor": "lr"}, 3, "Did you mean 'compressor'"),
    ("quantized", {"bits": 5}, 3, "bits=5 has no codec: use 4, 8 or 16"),
    ("quantized", {"bits": 4, "value_bits": 8}, 3, "value_bits=8 is more than bits=4"),
    ("quantized", {"group_size": 1}, 3, "group_size=1"),
    ("quantized", {"inner": "sinc"}, 3, "unknown cache policy 'sinc'"),
    ("quantized", {"iner": "full"}, 3, "Did you mean 'inner'"),
    ("quantized", {"inner": {"policy": "full", "num_frames": 3}}, 3, "Did you mean"),
    ("quantized", {"inner": SINK}, 3, "use 6 or more"),
    ("relax", {}, 4, "use 8 or more"),
    ("relax", {"num_candidates": 0}, 3, "num_candidates=0"),
    ("relax", {"num_budget_frames": 6}, 3, "num_budget_frames=6"),
    ("rolling_forcing", {"num_context_frames": 17}, 15, "a block of 15 frames: use 18 or more"),
    ("rolling_forcing", {"num_sink_frames": -1}, 3, "num_sink_frames=-1"),
    ("rolling_sink", {"num_context_frames": 7}, 4, "use 8 or more"),
    ("sink_windw", {}, 3, "unknown cache policy 'sink_windw'; known: full, sliding_window"),
    ("sliding_window", {"num_contxt_frames": 3}, 3, "Did you mean 'num_context_frames'"),
    ("slow_fast", {}, 4, "use 8 or more"),
    ("slow_fast", {"num_context_frames": 9}, 3, "use 10 or more"),
    ("tempcache", {"min_similarity": 0.0}, 3, "min_similarity=0.0 must be more than 0"),
    ("tempcache", {"num_context_frames": 2}, 3, "num_context_frames=2 leaves no room .* use 3 or more"),
]


@pytest.mark.parametrize(("policy", "settings", "block", "message"), REFUSED)
def test_settings_that_do_not_fit(policy, settings, block, message):
    with pytest.raises(ValueError, match=message):
        make_policy({"policy": policy, **settings}).check(block)


WORDS = [(name, f.name) for name in POLICIES for f in fields(POLICIES[name]) if get_origin(f.type) is Literal]


@pytest.mark.parametrize(("policy", "field"), WORDS)
def test_an_unknown_word_is_refused_in_yaml_and_in_python(policy, field):
    with pytest.raises(ValueError, match=f"{field} of cache policy '{policy}' is 'other'; known: "):
        make_policy({"policy": policy, field: "other"})
    with pytest.raises(ValueError, match=f"{field}='other' is unknown: use '"):
        type(make_policy(policy))(**{field: "other"})


def test_settings_name_their_policy():
    with pytest.raises(ValueError, match="need a key 'policy'"):
        make_policy({"num_context_frames": 3})
