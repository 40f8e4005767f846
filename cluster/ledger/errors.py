"""Errors of the ledger. Each class maps to one status of the admin API; the message names the object and the remedy."""

from __future__ import annotations

from cluster.api.outcomes import Outcome


class LedgerError(Exception):
    """Base class: the ledger has rejected an operation."""

    outcome = Outcome.INVALID_FIELD


class NotFound(LedgerError):
    """The object does not exist."""

    outcome = Outcome.NOT_FOUND


class AlreadyExists(LedgerError):
    """An object of that name exists already."""

    outcome = Outcome.ALREADY_EXISTS


class ManagedByFile(LedgerError):
    """The object is declared in a file and read-only over the API."""

    outcome = Outcome.MANAGED_BY_FILE


class NotPermitted(LedgerError):
    """The caller's role does not permit the operation."""

    outcome = Outcome.PERMISSION_DENIED


class StoreUnavailable(LedgerError):
    """The database does not answer, or this release cannot work on its tables."""

    outcome = Outcome.STORE_UNAVAILABLE
