"""Who does which unit, and what happens when one cannot be done; workers are stand-ins here."""

import errno
import json
import os
import threading
import time
from pathlib import Path

import pytest

from longtake.evaluation.records import ManifestLine
from longtake.evaluation.running import launchers, worker
from longtake.evaluation.running.launchers import Setup, run_local, run_share
from longtake.evaluation.running.plan import Unit

SETUP = Setup(protocol={}, keep_videos=True, checked=(), threads=1)
UNITS = [
    Unit(label="x", number=n, share=n, folder=Path("out"), lines=(ManifestLine(id=f"p{n}", file="a.mp4"),))
    for n in range(12)
]


class Watcher:
    """Notes what it is told."""

    def __init__(self):
        self.finished, self.num_ready, self.seen_steps = [], 0, []

    def ready(self, description):
        assert description == {"specs": []}
        self.num_ready += 1

    def steps(self, unit, steps):
        self.seen_steps.append((unit.number, steps))

    def done(self, unit):
        self.finished.append(unit.number)


@pytest.fixture
def fakes(monkeypatch):
    """Stand-ins for worker processes; ``do`` may be replaced."""

    class Fake:
        made = []
        do_unit = staticmethod(lambda unit: None)

        def __init__(self, setup, *, slot):
            self.slot, self.is_stopped = slot, False
            Fake.made.append(self)

        def wait_until_ready(self):
            return {"specs": []}

        def do(self, unit, *, on_steps):
            on_steps(0.5)
            Fake.do_unit(unit)

        def stop(self):
            self.is_stopped = True

    monkeypatch.setattr(launchers, "WorkerProcess", Fake)
    return Fake


@pytest.mark.parametrize("num_workers", [1, 3])
def test_every_unit_is_done_once_and_every_worker_ends(fakes, num_workers):
    watcher = Watcher()
    run_local(UNITS, SETUP, watcher, num_workers=num_workers, should_stop=lambda: False)
    assert sorted(watcher.finished) == list(range(12)) and watcher.num_ready == num_workers
    assert sorted(watcher.seen_steps) == [(n, 0.5) for n in range(12)]
    assert sorted(fake.slot for fake in fakes.made) == list(range(num_workers))
    assert all(fake.is_stopped for fake in fakes.made)


def test_the_others_finish_their_units_before_a_failure_is_raised(fakes):
    second_begun, first_failed = threading.Event(), threading.Event()

    def do(unit):
        if unit.number == 0:
            second_begun.wait(timeout=10)
            first_failed.set()
            raise ValueError("cannot read it")
        second_begun.set()
        first_failed.wait(timeout=10)
        time.sleep(0.3)  # until the failure is known to all

    fakes.do_unit = staticmethod(do)
    watcher = Watcher()
    with pytest.raises(ValueError, match="cannot read it"):
        run_local(UNITS, SETUP, watcher, num_workers=2, should_stop=lambda: False)
    assert watcher.finished == [1] and all(fake.is_stopped for fake in fakes.made)


def test_a_request_to_stop_begins_no_more_units(fakes):
    watcher = Watcher()
    run_local(UNITS, SETUP, watcher, num_workers=1, should_stop=lambda: len(watcher.finished) == 3)
    assert watcher.finished == [0, 1, 2]
    watcher = Watcher()
    run_share(UNITS, SETUP, watcher, rank=0, world_size=2, slot=0, should_stop=lambda: len(watcher.finished) == 3)
    assert watcher.finished == [0, 2, 4]


@pytest.mark.parametrize("world_size", [1, 2, 5, 20])
def test_ranks_share_the_units_without_talking(fakes, world_size):
    watcher = Watcher()
    for rank in range(world_size):
        run_share(UNITS, SETUP, watcher, rank=rank, world_size=world_size, slot=0, should_stop=lambda: False)
    assert sorted(watcher.finished) == list(range(12))
    assert len(fakes.made) == min(world_size, 12)


def answers(orders, monkeypatch, capfd):
    """What a worker answers to some orders, in this process."""
    reader, writer = os.pipe()
    os.write(writer, "".join(json.dumps(order) + "\n" for order in orders).encode())
    with os.fdopen(reader) as stream:
        monkeypatch.setattr(worker.sys, "stdin", stream)
        worker.main()
        lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
        # The thread that reads would end this process: it is left waiting instead.
        monkeypatch.setattr(worker.os, "_exit", lambda code: None)
        os.close(writer)
    return lines


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (ValueError("too long"), {"error": "too long"}),
        (
            OSError(errno.ENOSPC, "No space left on device", "a.mp4"),
            {"error": "No space left on device: a.mp4", "is_disk_full": True},
        ),
        (OSError(errno.EACCES, "Permission denied"), {"error": "Permission denied", "is_disk_full": False}),
    ],
)
def test_a_worker_says_why_it_stops(failure, expected, monkeypatch, capfd):
    class Refusing:
        def describe(self):
            return {"specs": []}

        def do(self, unit, *, on_steps):
            on_steps(1.0)
            raise failure

    monkeypatch.setattr(worker, "_set_up", lambda setup: Refusing())
    said = answers([{}, {"unit": UNITS[3].to_json()}], monkeypatch, capfd)
    assert said == [{"ready": {"specs": []}}, {"steps": 1.0}, expected]


def test_what_failed_is_told_with_a_remedy():
    full = launchers._failure({"error": "No space left on device: a.mp4", "is_disk_full": True}, "x")
    assert isinstance(full, ValueError) and "finished work is kept: free some space" in str(full)
    assert str(launchers._failure({"error": "too long"}, "x")) == "too long"
    # A fault of the program is no bad input: it comes with its traceback.
    fault = launchers._failure({"error": "KeyError: 'a'", "traceback": "Traceback ...\nKeyError: 'a'"}, "x, p3")
    assert isinstance(fault, RuntimeError) and "x, p3" in str(fault) and "Traceback" in str(fault)
