"""Programs of benchmarks/ import each other as they do when they are run: from their own folder."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
