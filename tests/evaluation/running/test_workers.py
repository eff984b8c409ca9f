"""Handing out units to workers, and failures; processes are stand-ins except where a real one dies."""

import errno
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from longtake.evaluation.records import ManifestLine
from longtake.evaluation.running import workers
from longtake.evaluation.running.plan import Unit
from longtake.evaluation.running.workers import _do_unit, _do_units, _local_workers

UNITS = [
    Unit(label="x", number=n, share=n, folder=Path("out"), lines=(ManifestLine(id=f"p{n}", file="a.mp4"),))
    for n in range(12)
]


class _Watcher:
    """The evaluation and its display."""

    def __init__(self):
        self.finished, self.num_ready, self.seen_steps = [], 0, []

    def setup(self, units):
        return units

    def describe(self, description):
        assert description == {"specs": []}

    def ready(self):
        self.num_ready += 1

    def steps(self, unit, steps):
        self.seen_steps.append((unit.number, steps))

    def done(self, unit):
        self.finished.append(unit.number)


class Fake:
    """A worker in a thread."""

    def __init__(self, slot, do):
        self.slot, self._do, self._threads = slot, do, ThreadPoolExecutor(1)

    def submit(self, function, *args):
        if function is _do_unit:
            return self._threads.submit(self._do, *args)
        return self._threads.submit(dict, specs=[])

    def steps(self):
        return 0.5


def work(do, *, num_workers, should_stop=lambda watcher: False):
    """Numbers of the finished units, or the error, and the watcher."""
    watcher, error = _Watcher(), None
    fakes = [Fake(slot, do) for slot in range(num_workers)]
    try:
        _do_units(watcher, UNITS, fakes, watcher=watcher, should_stop=lambda: should_stop(watcher))
    except Exception as raised:
        error = raised
    return watcher, error


@pytest.mark.parametrize("num_workers", [1, 3])
def test_every_unit_is_done_once(num_workers):
    watcher, error = work(lambda unit: None, num_workers=num_workers)
    assert error is None and sorted(watcher.finished) == list(range(12)) and watcher.num_ready == num_workers
    assert {number for number, _ in watcher.seen_steps} == set(range(12))


def test_the_others_finish_their_units_before_a_failure_is_raised():
    second_begun, first_failed = threading.Event(), threading.Event()

    def do(unit):
        if unit.number == 0:
            second_begun.wait(timeout=10)
            first_failed.set()
            raise ValueError("cannot read it")
        second_begun.set()
        first_failed.wait(timeout=10)
        time.sleep(0.3)  # until the failure is known
        if unit.number > 1:
            raise [RuntimeError("in p2:\nTraceback\nKeyError: 'a'"), ValueError("cannot read it")][unit.number - 2]

    watcher, error = work(do, num_workers=2)
    assert str(error) == "cannot read it" and watcher.finished == [1]
    watcher, error = work(do, num_workers=4)
    assert type(error) is RuntimeError and watcher.finished == [1]
    assert str(error).splitlines()[-2:] == ["KeyError: 'a';", "also: cannot read it"], "a fault first, each once"


def test_a_request_to_stop_begins_no_more_units():
    watcher, error = work(lambda unit: None, num_workers=1, should_stop=lambda watcher: len(watcher.finished) == 3)
    assert error is None and watcher.finished == [0, 1, 2]


def test_a_worker_that_dies_takes_no_other_with_it():
    """Its death is one line with a remedy; threads and signals are as they should be in the others."""
    with _local_workers(range(2), threads=3) as (first, second):
        environment = second.submit(os.getenv, "OMP_NUM_THREADS")
        with pytest.raises(Exception, match="terminated abruptly") as raised:
            first.submit(os.kill, first.submit(os.getpid).result(), signal.SIGKILL).result()
        error = workers._failure(raised.value, UNITS[3])
        assert isinstance(error, ValueError) and "x, videos p3 to p3: finished work is kept" in str(error)
        assert environment.result() == "3" != os.environ.get("OMP_NUM_THREADS")
        own = second.submit(os.getpid).result()
        assert second.submit(os.getsid, 0).result() == own
    assert not multiprocessing.active_children()


def test_an_interruption_ends_the_workers_at_once():
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt), _local_workers([0], threads=1) as (only,):
        only.submit(os.getpid).result()
        only.submit(time.sleep, 600)
        raise KeyboardInterrupt
    assert not multiprocessing.active_children() and time.monotonic() - begin < 300


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (ValueError("too long"), (ValueError, "too long")),
        (UnicodeDecodeError("utf-8", b"a", 0, 1, "bad"), (ValueError, "'utf-8' codec can't decode byte 0x61")),
        (
            OSError(errno.ENOSPC, "No space left on device", "a.mp4"),
            (ValueError, "the disk is full (No space left on device: a.mp4); finished work is kept: free some space"),
        ),
        (OSError(errno.EACCES, "Permission denied"), (ValueError, "Permission denied")),
        # A fault of the program is no bad input: it comes with its traceback.
        (KeyError("a"), (RuntimeError, "a worker failed in x, videos p3 to p3:\nTraceback")),
    ],
)
def test_a_worker_says_why_it_stops(failure, expected, monkeypatch):
    class Refusing:
        def do(self, unit, *, on_steps):
            raise failure

    monkeypatch.setattr(workers, "_worker", Refusing())
    with pytest.raises(expected[0]) as raised:
        _do_unit(UNITS[3])
    assert type(raised.value) is expected[0] and str(raised.value).startswith(expected[1])
