"""Size limit of the operator state (what operators have set at run time) that is sent on links."""

MAX_BYTES = 1 << 20
"""Maximum size in bytes of an OperatorState's document, enough for a hundred models with fifty adapters each."""
