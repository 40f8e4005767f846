"""Rate limits and budgets. Tokens are reserved when a call is admitted and settled when the call ends. Limits can be
shared between gateways."""
