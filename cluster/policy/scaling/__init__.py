"""Number of replicas of each model."""
