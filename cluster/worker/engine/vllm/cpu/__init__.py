"""vLLM on CPUs: a platform whose devices are Ray's logical GPUs."""
