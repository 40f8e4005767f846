"""The gRPC API, cluster.v1.Inference."""
