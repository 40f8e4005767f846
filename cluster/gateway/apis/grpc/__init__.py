"""cluster.v1.Inference over gRPC."""
