"""Tests of cluster.policy.adapters."""
