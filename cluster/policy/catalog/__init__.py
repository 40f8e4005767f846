"""Comparison of the models that should run with those that do run, and the steps to close the difference."""
