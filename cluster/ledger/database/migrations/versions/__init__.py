"""One file for each change, named r<number>_<what>.py; each says whether it expands or contracts."""
