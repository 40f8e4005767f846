"""The link protocol, which gateways speak with the workers and controllers that connect to them."""
