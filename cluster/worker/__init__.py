"""The worker process: one engine replica that serves gateways over its links."""
