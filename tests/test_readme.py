"""What the README shows in Python runs as it is printed."""

import re
import subprocess
import sys
from pathlib import Path

from opensoraplan.data.video import probe

README = Path(__file__).parents[1] / "README.md"


def test_the_python_example_makes_a_video(tmp_path: Path) -> None:
    code, *_ = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    info = probe(tmp_path / "ball.mp4")
    assert (info.frames, info.height, info.width, info.fps) == (25, 96, 128, 12)
