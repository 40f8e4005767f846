"""The gateway's side of its links: workers and controllers that dialled in."""
