"""What every process needs: limits, memory, core dumps, niceness, private files, periodic work."""
