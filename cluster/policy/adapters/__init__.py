"""Policies for LoRA adapters: which set of adapters is desired, and which adapters an engine's memory holds."""
