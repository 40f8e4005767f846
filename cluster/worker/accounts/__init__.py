"""A worker's accounts: the GPU time and token usage of requests, the durations of their stages, and reports of served
tokens for fair queueing."""
