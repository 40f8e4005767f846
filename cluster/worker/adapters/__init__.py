"""The LoRA adapters of one worker.

They are fetched, checked and loaded as the gateways request, and their states are reported to all gateways.
"""
