"""The command line in this process, where torch is imported already."""

from functools import partial

import cli
import pytest


@pytest.fixture
def call(capfd):
    """Runs words; returns (exit code, stdout, stderr)."""
    return partial(cli.call, capfd)


@pytest.fixture
def refused(call):
    """Runs words that are bad input, and expects one line with some messages."""

    def run(words, *messages, **settings):
        cli.assert_one_line(call(*words, **settings), *messages)

    return run
