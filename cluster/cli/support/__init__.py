"""The support bundle: what it has of a cluster, how it is redacted, and the archive."""
