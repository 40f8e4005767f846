"""Tokenization of texts. Text that was sent before is not tokenized again."""
