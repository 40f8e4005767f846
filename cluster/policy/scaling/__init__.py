"""Decision on the number of replicas of each model."""
