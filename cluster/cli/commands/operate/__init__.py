"""Commands for operators, which use a gateway's admin API or the database."""
