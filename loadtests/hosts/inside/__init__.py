"""Programs that run within the namespaces: callers, and stand-ins for what every Kubernetes cluster has."""
