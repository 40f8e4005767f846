"""Usage records from the gateway's spool to the database, budget notices, resume claims and sealed records."""
