"""Pooling calls: embeddings, scores and rankings."""
