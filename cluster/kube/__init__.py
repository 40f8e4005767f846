"""The Kubernetes Lease that selects the one controller that acts."""
