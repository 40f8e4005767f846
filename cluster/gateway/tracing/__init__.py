"""Traces of sampled calls. A call is recorded while it runs; when it has ended, its spans are made from the record."""
