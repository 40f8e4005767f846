"""The Engine implementation for vLLM: arguments, requests, the step loop, exact resume, and repairs of vLLM."""
