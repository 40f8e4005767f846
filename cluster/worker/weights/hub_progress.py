"""Progress of downloads from the Hugging Face hub. The hub's library reports progress only to progress bars."""

from __future__ import annotations

from typing import Any

from cluster.worker.weights.fetching import Progress


class _NoOutput:
    """A file that discards everything written to it."""

    def write(self, text: str) -> int:
        """Discard a text; return its length."""
        return len(text)

    def flush(self) -> None:
        """Do nothing."""


def reporting_bar(progress: Progress, name: str) -> type[Any]:
    """Return a class of invisible progress bars, for the argument `tqdm_class` of snapshot_download.

    The bars report the number of fetched bytes to `progress`. `name`: the repository's name.

    snapshot_download has one bar that counts files, and one or two bars that count bytes, since it can transfer files
    in two ways. The bar with the most bytes is reported.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    farthest = (0, 0)

    class ReportingBar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "file": _NoOutput(), "disable": False})

        def update(self, n: float | None = 1) -> Any:
            nonlocal farthest
            shown = super().update(n)
            if self.unit == "B":
                farthest = max(farthest, (int(self.n), int(self.total or 0)))
                progress(*farthest, name)
            return shown

    return ReportingBar
