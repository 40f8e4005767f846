"""The open accounts of a gateway. An account collects what a sequence has used. It is opened when the
sequence is first submitted to a worker, and stays open until the usage record of the sequence is written.

The id of a record is fixed before the first submission and stays the same over retries. It has a random part, which no
worker learns, so that no worker can take the id of another record.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping

import structlog

from cluster.gateway.calls.call import CallSequence
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.resume_tokens.claim import ResumeTerms
from cluster.gateway.usage.call_account import CallAccount, fit_text
from cluster.ledger.usage.records import SEGMENTS_PER_RESUME, OpenRecord, RecordError
from cluster.ledger.usage.sealed_records import Sealer

log = structlog.get_logger("ledger")

ID_BYTES = 8
"""Size of the random part of a record id, in bytes."""


class OpenAccounts:
    """The open accounts of one gateway process. An account is open from the first Submit of a sequence until the
    sequence's usage record is written."""

    def __init__(
        self,
        *,
        incarnation: str,
        sealer: Sealer,
        gateway: str,
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        """`incarnation`: the prefix of record ids. `gateway`: the gateway's name in records."""
        self._incarnation = incarnation
        self._sealer = sealer
        self._gateway = fit_text(gateway)
        self._clock = clock
        self._wall = wall
        self._numbers = itertools.count(1)
        self._by_sequence: dict[str, CallAccount] = {}
        """Accounts of the sequences that have not ended."""
        self._by_seal: dict[bytes, CallAccount] = {}
        """All open accounts, by the sealed record of their Submits."""

    def __len__(self) -> int:
        return len(self._by_seal)

    def __repr__(self) -> str:
        return f"OpenAccounts({len(self._by_seal)})"

    # ---- Submits of a sequence

    def open(self, sequence: CallSequence, link: WorkerLink) -> bytes:
        """Open the account of a sequence that is about to be submitted on this link. A retry uses the account that the
        sequence already has. Returns the account's usage record as sealed bytes. The worker keeps this copy."""
        account = self._by_sequence.get(sequence.key)
        if account is None:
            record = self._record(sequence, link)
            account = self._by_sequence[sequence.key] = CallAccount(record, self._sealer.seal(record))
            self._by_seal[account.sealed] = account
        account.awaited += 1
        account.continued = bool(sequence.emitted)
        account.add_worker(link.identity)
        account.assign(link.identity, sequence.route)
        return account.sealed

    def hedged(self, sequence: CallSequence, link: WorkerLink) -> bytes:
        """Record that a sequence is also sent to a second worker, so that the account waits for one more usage report.
        Returns the sealed record for the second worker. Raises KeyError for a sequence without an open account."""
        account = self._by_sequence[sequence.key]
        account.awaited += 1
        account.add_worker(link.identity)
        return account.sealed

    def hedge_ended(self, sequence: CallSequence, computed_by: str) -> None:
        """Record that one of the two workers of a hedged sequence has dropped out. `computed_by`: incarnation of that
        worker; "" if that worker refused the sequence."""
        account = self._by_sequence.get(sequence.key)
        if account is not None and sequence.link is not None:
            account.assign(sequence.link.identity, sequence.route)
        if account is not None and computed_by:
            account.in_vain.append(computed_by)

    def refused(self, sequence: CallSequence) -> None:
        """Stop waiting for the counts of a worker that refused the sequence. A refused sequence costs nothing on that
        worker."""
        if (account := self._by_sequence.get(sequence.key)) is not None:
            account.awaited -= 1

    # ---- end of a sequence

    def pop_ended(self, sequence: CallSequence) -> CallAccount | None:
        """Return the account of a sequence that has ended. The account stays open until `remove`. Returns None if the
        sequence has no account, or if its account was returned before."""
        return self._by_sequence.pop(sequence.key, None)

    def find(self, sealed: bytes) -> CallAccount | None:
        """Return the open account with this sealed record; None if no open account has it."""
        return self._by_seal.get(sealed)

    def remove(self, account: CallAccount) -> None:
        """Remove an account that is being closed. Idempotent."""
        self._by_seal.pop(account.sealed, None)

    # ---- records

    def _record(self, sequence: CallSequence, link: WorkerLink) -> OpenRecord:
        try:
            return self._opened(sequence, link, sequence.call.labels)
        except RecordError as error:
            record = self._opened(sequence, link, {})
            log.warning("usage.labels_dropped", **sequence.call.log_fields, record=record.record_id, reason=str(error))
            return record

    def _opened(self, sequence: CallSequence, link: WorkerLink, labels: Mapping[str, str]) -> OpenRecord:
        call, now = sequence.call, self._clock()
        pays = call.payment.terms is ResumeTerms.PAID or not call.is_resumed
        has_own_prompt = call.is_pooling or not sequence.index
        return OpenRecord(
            record_id=f"{self._incarnation}.{next(self._numbers)}-{os.urandom(ID_BYTES).hex()}.{sequence.index}",
            tenant=call.tenant,
            key_id=fit_text(call.key_id),
            model=call.model,
            version=link.identity.version,
            request_id=fit_text(call.request_id),
            opened_at_s=self._wall() - (now - call.arrived),
            adapter=call.adapter,
            segment=sequence.index
            + (0 if call.resume_tokens is None else call.resume_tokens.generation * SEGMENTS_PER_RESUME),
            prompt_tokens=len(sequence.request.prompt_token_ids) if pays and has_own_prompt else 0,
            queue_s=max(now - call.arrived, 0.0),
            labels=labels,
            gateway=self._gateway,
            trace_id=call.trace_id,
        )
