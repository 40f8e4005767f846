"""What a worker counts: GPU time, usage of requests, times, and reports for fair queueing."""
