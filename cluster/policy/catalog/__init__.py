"""Comparison of wanted models with running models, and the steps that close the difference."""
