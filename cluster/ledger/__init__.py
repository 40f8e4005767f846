"""Durable data: tenants, keys, usage and audit, in SQLite or PostgreSQL, and the local spool of usage records.

This module imports nothing. `records`, `spool`, `sealed_records` and `audit` need no SQLAlchemy, so a gateway without a
database starts fast. `store` and the modules of the tables import SQLAlchemy.
"""
