"""Which waiting sequence is sent next and to which worker, for new and for resumed sequences."""
