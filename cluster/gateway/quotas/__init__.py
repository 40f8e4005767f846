"""Rate limits and budgets: reserved at admission, settled at the end, shared between gateways."""
