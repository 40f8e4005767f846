"""Weights and tokenizer of a model: sources, downloads, digests, checks."""
