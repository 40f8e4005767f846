"""Choice of the next sequence and its worker, for sequences that begin and for sequences that resume."""
