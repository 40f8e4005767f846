"""Leader election by a Kubernetes Lease: one of several controllers acts at a time."""
