"""Traces of sampled calls. Each call is recorded while it runs; when it has ended, its spans are made of the record."""
