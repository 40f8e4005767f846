"""Programs that run inside the network namespaces of the load test `hosts`. Each namespace stands for a host of a
cluster.

The programs are callers, and stand-ins for the services that every Kubernetes cluster has: DNS and the API server.
"""
