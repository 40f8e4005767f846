"""How a ledger says no. Each class is one status of the admin API; the message names the object and the remedy."""

from __future__ import annotations

from cluster.api.outcomes import Outcome


class LedgerError(Exception):
    """The ledger does not do what was asked."""

    outcome = Outcome.INVALID_FIELD


class NotFound(LedgerError):
    """There is no such object."""

    outcome = Outcome.NOT_FOUND


class AlreadyExists(LedgerError):
    """There is one of that name already."""

    outcome = Outcome.ALREADY_EXISTS


class ManagedByFile(LedgerError):
    """The object is declared in a file and read-only over the API."""

    outcome = Outcome.MANAGED_BY_FILE


class NotPermitted(LedgerError):
    """Who asks has no say in this."""

    outcome = Outcome.PERMISSION_DENIED


class StoreUnavailable(LedgerError):
    """The database does not answer, or its tables are not those this release needs."""

    outcome = Outcome.STORE_UNAVAILABLE
