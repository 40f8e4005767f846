"""Commands that start processes: a local cluster, and the processes of pods."""
