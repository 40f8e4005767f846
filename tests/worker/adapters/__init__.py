"""Tests of a worker's adapters."""
