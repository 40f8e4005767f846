"""Policies of adapters (LoRA)."""
