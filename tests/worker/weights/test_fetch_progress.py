"""The progress of fetched weights: the bytes, and their rate."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cluster.worker.weights.fetch_progress import WINDOW_S, FetchProgress
from cluster.worker.weights.hub_progress import reporting_bar


def test_the_rate_is_that_of_the_last_seconds() -> None:
    """The rate is the mean over a window of seconds. It is 0 before the second report and after a pause, and never
    below 0."""
    now = [100.0]
    progress = FetchProgress(lambda: now[0])
    assert progress.bytes_per_s == 0
    for step in range(40):
        progress.report(step * 50 if step < 20 else 1000 + (step - 20) * 200, 10_000, "model.safetensors")
        now[0] += 1.0
    assert (progress.fetched_bytes, progress.total_bytes) == (4800, 10_000)
    assert progress.bytes_per_s == pytest.approx(200)
    now[0] += WINDOW_S + 1
    assert progress.bytes_per_s == 0


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(0, 10**12)), max_size=50))
@example([(0.0, 0), (5e-324, 1)])
def test_any_progress_has_a_rate(reports: list[tuple[float, int]]) -> None:
    """For any reports, the rate is finite and at least 0, and the memory for the reports stays bounded."""
    now = 0.0
    progress = FetchProgress(lambda: now)
    for pause, fetched in reports:
        now += pause
        progress.report(fetched, 10**12)
        assert 0 <= progress.bytes_per_s < float("inf")
    assert len(progress._seen) <= len(reports)


def test_a_hub_download_reports_its_bytes(capfd: pytest.CaptureFixture[str]) -> None:
    """Of several progress bars in bytes, the one that is farthest is reported, and its total may grow. Bars that count
    files report nothing. Nothing is printed."""
    seen: list[tuple[int, int, str]] = []
    bar = reporting_bar(lambda *progress: seen.append(progress), "org/model")
    network = bar(total=0, initial=0, unit="B", unit_scale=True, desc="Downloading")
    disk = bar(total=0, initial=0, unit="B", unit_scale=True, desc="Reconstructing")
    disk.total = 70
    disk.update(30)
    network.update(10)
    disk.update(40)
    assert seen == [(30, 70, "org/model"), (30, 70, "org/model"), (70, 70, "org/model")]
    assert list(bar([1, 2, 3], desc="Fetching 3 files")) == [1, 2, 3]
    assert len(seen) == 3
    assert "".join(capfd.readouterr()) == ""
