"""Answers of this gateway process to the questions that other processes ask (peers.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.gateway.console.history.sampling import query_columns
from cluster.gateway.console.overview.live import LiveOverview
from cluster.gateway.console.peers.peers import Question, part_for_peers


class PeerAnswers:
    """Answers the questions of other processes with data of this process's live overview."""

    def __init__(self, live: LiveOverview) -> None:
        self._live = live

    async def __call__(self, question: Question) -> Mapping[str, Any] | None:
        """Return the answer to a question; None if this release does not know the kind of the question. Raises
        KeyError, TypeError and ValueError for a malformed question."""
        match question["kind"]:
            case "part":
                return part_for_peers(await self._live.part(), bool(question["has_all"]))
            case "history":
                return await query_columns(self._live.history, question["query"])
            case _:
                return None
