"""Streams that outlive their gateway: tokens in chunks, and calls that resume from them."""
