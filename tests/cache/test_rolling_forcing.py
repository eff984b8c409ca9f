"""Rolling Forcing's cache against the index traces of the released code."""

import pytest

from longtake.cache.policies.rolling_forcing import RollingForcing


def windows(policy, *, num_blocks, num_levels, block=3):
    """(window, its plan, the commit's plan) in order, by the policy's own rules for what is kept."""
    stored = ()
    for w in range(num_levels - 1, num_blocks + num_levels - 1):
        first, last = w - num_levels + 1, min(w, num_blocks - 1)
        start = first * block
        plan = policy.read(stored, start, (last - first + 1) * block)
        commit = policy.commit_plan(stored, start, block)
        yield w, plan, commit
        stored = policy.keep((*stored, *range(start, start + block)), start + block, block)


def read(plan, num_sinks=3):
    """First position of the sinks and the working frames as one range."""
    sinks = [p for f, p in zip(plan.frames, plan.positions, strict=True) if f < num_sinks]
    work = [f for f in plan.frames if f >= num_sinks]
    own = [p for f, p in zip(plan.frames, plan.positions, strict=True) if f >= num_sinks]
    assert own == [float(f) for f in work] and sinks == [sinks[0] + i for i in range(len(sinks))] if sinks else True
    return sinks[0] if sinks else None, (work[0], work[-1]) if work else ()


def test_windows_read_what_the_released_code_reads():
    plans = {w: plan for w, plan, _ in windows(RollingForcing(), num_blocks=14, num_levels=5)}
    assert plans[4].frames == () and plans[4].query_positions == tuple(map(float, range(15)))
    assert {w: read(plans[w]) for w in (5, 6, 7, 8, 14, 17)} == {
        5: (0, ()),
        6: (0, (3, 5)),
        7: (3, (6, 8)),
        8: (6, (9, 11)),
        14: (21, (24, 29)),
        17: (21, (24, 38)),
    }
    totals = {w: len(plan.frames) + len(plan.query_positions) for w, plan in plans.items()}
    assert totals == {4: 15, 5: 18} | dict.fromkeys(range(6, 18), 21)
    assert [int(plans[w].query_positions[0]) for w in (5, 14, 17)] == [3, 30, 39]


def test_commits_read_what_the_released_code_reads():
    commits = {w: commit for w, _, commit in windows(RollingForcing(), num_blocks=14, num_levels=5)}
    attended = {w: (*c.frames, *map(int, c.query_positions)) for w, c in commits.items()}
    assert attended[4] == tuple(range(3))
    for w, first, last in ((6, 0, 8), (10, 0, 20), (11, 3, 23), (12, 6, 26)):
        assert attended[w] == tuple(range(first, last + 1))
    assert all(c.positions == tuple(map(float, c.frames)) for c in commits.values())


def test_commits_with_sinks_kept_read_what_the_block_itself_would():
    policy = RollingForcing(commit="keep_sinks")
    for w, _, commit in windows(policy, num_blocks=400, num_levels=5):
        start = 3 * (w - 4)
        assert commit.frames == tuple(range(min(3, start))) + tuple(range(max(3, start - 15), start))
        assert len(commit.frames) <= 18
        assert commit.positions == tuple(map(float, range(start - len(commit.frames), start)))


@pytest.mark.parametrize(("block", "levels", "context", "sinks"), [(1, 4, 9, 2), (4, 3, 24, 6), (3, 4, 21, 0)])
def test_any_sizes(block, levels, context, sinks):
    policy = RollingForcing(num_context_frames=context, num_sink_frames=sinks)
    policy.check(block * levels)
    for _, plan, commit in windows(policy, num_blocks=60, num_levels=levels, block=block):
        start, count = int(plan.query_positions[0]), len(plan.query_positions)
        assert len(plan.frames) + count <= context and len(commit.frames) + block <= context
        assert plan.frames[: min(sinks, start)] == tuple(range(min(sinks, start)))
        assert plan.positions == tuple(map(float, range(start - len(plan.frames), start)))
