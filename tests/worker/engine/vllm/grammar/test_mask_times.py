"""The measurement of masks in the engine core."""

from __future__ import annotations

import threading

import pytest

from cluster.worker.engine.vllm.grammar.mask_times import MAX_MASK_S, MAX_MEAN_S, MEAN_OVER, MaskThread, MaskTimes


def test_a_grammar_is_slow_after_one_long_mask_or_many_that_are_too_long_on_average() -> None:
    """One mask above its bound, or an average above its own, makes a grammar slow; single peaks below do not."""
    once, often, peaks = MaskTimes(), MaskTimes(), MaskTimes()
    once.add(MAX_MASK_S * 1.01)
    for _ in range(3 * MEAN_OVER):
        often.add(MAX_MEAN_S * 1.2)
    for at in range(1000):
        peaks.add(MAX_MASK_S * 0.5 if at % 100 == 0 else 0.0002)
    assert (once.is_slow, often.is_slow, peaks.is_slow) == (True, True, False)


def test_results_and_errors_of_the_second_thread_reach_the_first() -> None:
    """The waiting thread gets the result or the error of each piece of work, and the thread goes on after an error."""
    thread = MaskThread()

    def fail() -> None:
        raise ValueError("no mask")

    assert thread.run(lambda: 7) == 7
    with pytest.raises(ValueError, match="no mask"):
        thread.run(fail)
    assert thread.run(threading.get_ident) != threading.get_ident()


def test_a_mask_that_computes_for_too_long_is_left_behind() -> None:
    """The first thread stops waiting for a mask that computes without end; its grammar is slow, and nothing that the
    second thread would do afterwards happens."""
    thread, times, end, reached = MaskThread(), MaskTimes(), threading.Event(), threading.Event()

    def compute() -> None:
        while not end.is_set():
            pass

    def work() -> None:
        thread.fill(times, 0.0, compute)
        reached.set()

    with pytest.raises(TimeoutError):
        thread.run(work)
    end.set()
    thread.join()
    assert times.is_slow
    assert not reached.is_set()


def test_a_mask_that_waits_is_waited_for() -> None:
    """A mask that gets no CPU time for ten times the bound is not too slow, as on a busy host."""
    thread, times, pause = MaskThread(), MaskTimes(), threading.Event()
    thread.run(lambda: thread.fill(times, 0.0, lambda: pause.wait(10 * MAX_MASK_S)))
    assert not times.is_slow
