"""The address of the admin port that a command uses."""

from __future__ import annotations

import pytest

from cluster.cli.target.access import admin_access
from cluster.cli.target.contexts import ClusterTarget


@pytest.mark.parametrize(
    ("endpoint", "admin", "address"),
    [
        ("gw-1:50051,gw-2:50051", None, "gw-1:50053"),
        ("[::1]:50051,gw-2:50051", None, "[::1]:50053"),
        ("gw-1:50051", "gw-1:7000,gw-2:7000", "gw-1:7000"),
    ],
)
def test_the_first_of_several_gateways(endpoint: str, admin: str | None, address: str) -> None:
    """Of several gateways, the first gets the admin calls."""
    assert admin_access(ClusterTarget(endpoint, admin)).address == address
