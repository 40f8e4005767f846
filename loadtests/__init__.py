"""Load tests: one driver, several faces, and the peers beside ours in the same run. `python -m loadtests --help`."""

import os

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # before grpc is imported: that a server has gone is told in our words
