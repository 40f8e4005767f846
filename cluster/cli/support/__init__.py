"""The support bundle: its parts, their redaction, and the archive."""
