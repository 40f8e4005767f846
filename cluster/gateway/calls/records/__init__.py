"""Records of calls that have ended: log lines, metrics and facts for spans."""
