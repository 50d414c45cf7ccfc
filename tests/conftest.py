"""Every test runs offline, quiet, and on one thread: two workers of pytest share two cores, and idle threads that spin would slow both."""

from __future__ import annotations

import os

import pytest

FIRST = ("test_line.py", "test_services.py", "test_peers.py", "test_sweep.py")
"""Minutes of one file go to one worker: begun last, they would be waited for alone. (xdist keeps this order with --no-loadscope-reorder.)"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


for name, value in {
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_OFFLINE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(name, value)
