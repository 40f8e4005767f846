"""vLLM behind the engine port: arguments, requests, its step loop, exact resume, repairs."""
