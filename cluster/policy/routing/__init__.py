"""The choice of a version and of a worker for one sequence."""
