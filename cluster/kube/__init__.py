"""Leader election by a Kubernetes Lease: of several controllers, only one acts at a time."""
