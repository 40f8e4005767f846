"""Parts of the scenario `hostile`. Each part attacks a promise of SECURITY.md or docs/failures.md and measures the
harm.
"""
