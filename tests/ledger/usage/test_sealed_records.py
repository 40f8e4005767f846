"""A worker, which has no secret, cannot read, change or forge a sealed record."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.ledger.usage.records import OpenRecord
from cluster.ledger.usage.sealed_records import Sealer, SealError

A, B = b"a" * 32, b"b" * 32
OPENED = OpenRecord("r1", "tenant-acme", "key-of-acme", "model-tiny", "v1", "q1", 5.0, labels={"team": "geheim-secret"})
SEALED = Sealer((A,)).seal(OPENED)


def test_any_gateway_opens_what_one_has_sealed() -> None:
    """Any process with the secret can open a sealed record. The sealed record is small and hides its content.

    Sealing the same record again gives different bytes.
    """
    assert Sealer((A,)).open(SEALED) == OPENED
    assert len(SEALED) < 500
    # Only long names are checked: two given letters occur by chance in one of some hundred sealed records.
    hidden = (OPENED.tenant, OPENED.key_id, OPENED.model, *OPENED.labels.values())
    assert not any(name.encode() in SEALED for name in hidden)
    sealer = Sealer((A,))
    assert len({sealer.seal(OPENED) for _ in range(1000)}) == 1000


def test_a_secret_is_replaced_without_loss() -> None:
    """New records are sealed with the first of several secrets. A record can be opened until its secret is removed from
    the list."""
    assert Sealer((B, A)).open(SEALED) == OPENED
    assert Sealer((B,)).open(Sealer((B, A)).seal(OPENED)) == OPENED
    with pytest.raises(SealError, match="does not have"):
        Sealer((B,)).open(SEALED)


@given(st.integers(0, len(SEALED) - 1), st.integers(1, 255))
def test_no_byte_can_be_changed(at: int, flip: int) -> None:
    """Opening a sealed record raises SealError if any byte was changed."""
    changed = bytearray(SEALED)
    changed[at] ^= flip
    with pytest.raises(SealError):
        Sealer((A,)).open(bytes(changed))


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    """Opening arbitrary bytes or a truncated record raises SealError and no other exception."""
    with pytest.raises(SealError):
        Sealer((A,)).open(data)
    with pytest.raises(SealError):
        Sealer((A,)).open(SEALED[: len(SEALED) - 1 - len(data)])


def test_a_megabyte_is_refused_and_salts_are_bounded() -> None:
    """Sealed data that is too large is rejected before it is decrypted. The number of cached keys, one for each salt,
    is bounded."""
    with pytest.raises(SealError, match="not a sealed record"):
        Sealer((A,)).open(SEALED + b"x" * 1_000_000)
    opener = Sealer((A,))
    for _ in range(1100):
        assert opener.open(Sealer((A,)).seal(OPENED)) == OPENED
    assert len(opener._envelopes._keys) <= 1024


def test_without_a_secret_nothing_is_sealed() -> None:
    """Creating a Sealer without a secret raises an error that names the setting `cluster_secret_file`."""
    with pytest.raises(ValueError, match="cluster_secret_file"):
        Sealer(())
