"""Errors of the ledger. Each class maps to one status of the admin API. Messages name the object and the remedy."""

from __future__ import annotations

from cluster.api.outcomes import Outcome


class LedgerError(Exception):
    """Error: the ledger has rejected an operation. Base class of the ledger's errors."""

    outcome = Outcome.INVALID_FIELD


class NotFound(LedgerError):
    """The object does not exist."""

    outcome = Outcome.NOT_FOUND


class AlreadyExists(LedgerError):
    """Error: an object with the same name exists already."""

    outcome = Outcome.ALREADY_EXISTS


class ManagedByFile(LedgerError):
    """The object is declared in a file, so the API cannot change it."""

    outcome = Outcome.MANAGED_BY_FILE


class NotPermitted(LedgerError):
    """The caller's role does not permit the operation."""

    outcome = Outcome.PERMISSION_DENIED


class StoreUnavailable(LedgerError):
    """The database does not answer, or this release cannot work on the database's tables."""

    outcome = Outcome.STORE_UNAVAILABLE
