"""Memory of GPUs that a model takes, divisions among GPUs that fit, and the number of replicas for a load."""
