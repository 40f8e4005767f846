"""What Headrace asks of Kubernetes itself: one Lease, so that of several controllers one acts."""
