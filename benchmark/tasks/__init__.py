"""The tasks: python -m benchmark.tasks.NAME prepares one; a training script imports it for its reward."""

import os
import sys

if "torch" not in sys.modules:  # it is being prepared: threads that wait must not spin, which starves a busy machine
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
