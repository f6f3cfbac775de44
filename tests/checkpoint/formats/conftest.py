import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def quick_disk():
    """Tests need not wait for the disk."""
    real = os.fsync, os.fdatasync
    os.fsync = os.fdatasync = lambda fd: None
    yield
    os.fsync, os.fdatasync = real
