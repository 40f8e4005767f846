"""Tests of admission and queues."""
