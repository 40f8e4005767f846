"""The models that should run, compared with those that do, and the steps between."""
