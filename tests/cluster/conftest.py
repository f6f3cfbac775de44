"""These tests change the network and start daemons, as root: `make cluster` asks for them, a plain run never does."""

import os

collect_ignore_glob = [] if os.environ.get("ARRIERO_CLUSTER") else ["test_*.py"]
