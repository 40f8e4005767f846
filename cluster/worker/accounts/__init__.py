"""Accounting in a worker: the GPU time, token usage and stage durations of requests, and reports of served tokens for
fair queueing.
"""
