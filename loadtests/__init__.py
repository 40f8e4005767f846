"""Load tests: one driver, several APIs, and peer servers measured in the same run. `python -m loadtests --help`."""

import os

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # set before grpc is imported: the driver itself reports a dead server
