"""Choice of the waiting sequence that is sent next, and of the worker that gets it, for new and for resumed
sequences."""
