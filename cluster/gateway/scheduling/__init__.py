"""Which waiting sequence goes to which worker, and when."""
