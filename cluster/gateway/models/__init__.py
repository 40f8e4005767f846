"""The models that a gateway knows, by name and alias, with their adapters, versions and tokenizers."""
