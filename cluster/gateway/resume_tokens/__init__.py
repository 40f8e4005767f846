"""Resume of streams after the loss of their gateway: resume tokens in chunks, and calls that continue from them."""
