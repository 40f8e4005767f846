"""vLLM on CPUs: a platform whose devices are Ray's logical GPUs, and a single rank in the engine core's process."""
