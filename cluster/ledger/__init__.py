"""What must survive: tenants, keys, usage and audit, in SQLite or PostgreSQL, and the spool before it.

Nothing is imported here: `records`, `spool`, `sealed` and `audit` stand without SQLAlchemy, so that a gateway without
a store starts as fast as ever; `store` and its neighbours bring SQLAlchemy when they are first used.
"""
