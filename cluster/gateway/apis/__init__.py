"""The APIs: bytes become requests, chunks become bytes, outcomes become statuses."""
