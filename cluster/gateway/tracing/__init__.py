"""Traces of calls: what is recorded while a sampled call runs, and the spans that are made of it when it has ended."""
