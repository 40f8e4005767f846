"""The models that a gateway knows: their lookup by name and alias, their adapters, versions and tokenizers."""
