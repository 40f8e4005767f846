"""The adapters (LoRA) of one worker: fetched, checked and loaded as its gateways want, and reported to all of them."""
