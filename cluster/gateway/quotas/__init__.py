"""Rate limits and budgets: reserved at admission, settled at a call's end, shared between gateways."""
