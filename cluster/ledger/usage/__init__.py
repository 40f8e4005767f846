"""Usage records, budget notices and resumed segments, from the gateway's spool to the database."""
