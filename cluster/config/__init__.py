"""Reading and checking of cluster.yaml."""
