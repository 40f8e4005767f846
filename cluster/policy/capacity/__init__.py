"""What a model takes of GPUs' memory, which parallelism fits, and how many replicas a load needs."""
