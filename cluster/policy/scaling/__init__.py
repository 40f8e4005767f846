"""The number of replicas of each model."""
