"""Paths and small helpers of all tests. MANAGER_GOLDEN points the parity tests at the full golden set."""
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(os.environ.get("MANAGER_GOLDEN", ROOT / "tests" / "golden")).resolve()
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
