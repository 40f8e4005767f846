"""Tokenization of texts, in which text that was sent before is not tokenized again."""
