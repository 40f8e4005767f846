"""The Kubernetes Lease by which one controller is selected to act."""
