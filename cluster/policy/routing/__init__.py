"""Choice of a version and a worker for one sequence."""
