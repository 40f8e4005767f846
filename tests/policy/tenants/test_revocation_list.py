"""Tests of reading and writing certificate revocation lists, with serial numbers in the formats of openssl and
browsers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.policy.tenants.revocation_list import Revocation, RevocationList, serial_of

COLUMN = st.text(st.characters(exclude_categories=["C", "Z"]), max_size=20).filter(lambda text: text == text.strip())


@pytest.mark.slow
@given(st.lists(st.builds(Revocation, st.integers(0, 2**160 - 1), COLUMN, COLUMN)))
def test_a_list_is_read_as_it_was_written(entries: list[Revocation]) -> None:
    """Written entries are read back unchanged. If one changed, a revoked certificate would be accepted."""
    text = "# a comment\n\n" + "\r\n".join(one.line() for one in entries) + "\n"
    assert list(RevocationList.parse(text).entries) == entries


@given(st.integers(0, 2**160 - 1))
def test_serials_as_tools_print_them(serial: int) -> None:
    """Serial numbers in the formats of openssl and browsers are read, in upper and lower case and with leading
    zeros."""
    digits = f"{serial:040x}"
    for text in (
        digits,
        digits.upper(),
        f"0x{digits}",
        f"serial={digits}",
        ":".join(digits[i : i + 2] for i in range(0, 40, 2)),
    ):
        assert serial_of(f" {text}\n") == serial


@pytest.mark.parametrize("line", ["xyz", "1 2", "-1", "f" * 65, "1\ta\tb\tc", "1;2"])
def test_a_wrong_line_is_named(line: str) -> None:
    """The error names the invalid line. If an invalid line were ignored, a typo would leave a revoked certificate
    valid."""
    with pytest.raises(ValueError, match="line 2"):
        RevocationList.parse(f"1\n{line}\n")


def test_a_serial_counts_for_its_issuer() -> None:
    """A serial number that is listed with an issuer is revoked for this issuer only. One that is listed without an
    issuer is revoked for all issuers."""
    revoked = RevocationList.parse("0A:1B\tCN=ours\n0c\n")
    assert revoked.has(0x0A1B, "CN=ours")
    assert not revoked.has(0x0A1B, "CN=theirs")
    assert revoked.has(0x0C, "CN=ours")
    assert revoked.has(0x0C, "CN=theirs")
    assert not RevocationList().has(0, "")
