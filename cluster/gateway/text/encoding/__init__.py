"""Tokenization: texts become token ids, and what was sent before is not tokenized again."""
