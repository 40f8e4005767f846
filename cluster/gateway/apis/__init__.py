"""The APIs that callers speak: decode requests, encode chunks, and map outcomes to statuses."""
