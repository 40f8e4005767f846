"""The test bed of the scenario `hosts`: a cluster of real processes, started from the rendered Helm chart. Each host of
the cluster is a network namespace."""
