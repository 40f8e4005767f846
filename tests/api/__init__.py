"""Tests of the types that all packages share."""
