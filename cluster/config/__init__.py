"""cluster.yaml: its models, checks and errors."""
