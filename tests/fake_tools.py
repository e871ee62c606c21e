"""What the tests of `make gpu` share: its modules on the path, and scripts that stand for a tool of a GPU machine."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))


def tool(folder, name, script):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(script)
    (folder / name).chmod(0o755)
