"""Resume of streams after the loss of their gateway. Chunks carry resume tokens, and a call can continue from these
tokens at another gateway."""
