"""`python bench/gpu`: reads the sources of this checkout, for nothing is installed before the first stage."""

import sys
from pathlib import Path

if __name__ == "__main__":
    root = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(root / "bench"), str(root / "python")]  # in place of this folder, whose modules are gpu.*
    from gpu.command import main

    sys.exit(main())
