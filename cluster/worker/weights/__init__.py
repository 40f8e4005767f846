"""A model's weights and tokenizer: sources, downloads, digests and checks."""
