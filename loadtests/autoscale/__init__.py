"""What the autoscaler is held against: demand from traces, the clairvoyant optimum, Ray Serve's policy, static."""
