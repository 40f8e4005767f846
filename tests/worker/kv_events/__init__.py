"""Tests of the KV blocks that a worker reports."""
