"""A clock of training stages that does not depend on this machine."""

import pytest

from lab.mini.runtime import StageLog


@pytest.fixture
def one_second_a_step(monkeypatch):
    def advance(log):
        log.spent += 1.0
        return min(1.0, log.spent / log.budget)

    monkeypatch.setattr(StageLog, "advance", advance)
