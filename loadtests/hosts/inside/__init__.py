"""Programs that run within the namespaces: callers, and stand-ins for the services of every Kubernetes cluster."""
