"""The cluster that a command talks to: its addresses, credentials and contexts."""
