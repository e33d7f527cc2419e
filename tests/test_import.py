"""Importing the package and asking for help load no heavy library, so that both are quick."""

import subprocess
import sys

import pytest

import opensoraplan

HEAVY = ("torch", "diffusers", "transformers", "av", "numpy", "PIL")


def heavy_modules(code: str) -> str:
    """Which heavy modules a fresh interpreter has loaded after `code`."""
    report = f"print('HEAVY', *(name for name in {HEAVY} if name in sys.modules))"
    script = f"import sys\n{code}\n{report}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def test_importing_the_package() -> None:
    assert heavy_modules("import opensoraplan") == "HEAVY"


def test_help_and_mistakes() -> None:
    code = """
from opensoraplan.cli import main
for line in (
    "--help",
    "generate --help",
    "generate",
    "generate cat --model nowhere --frames 10",
    "generate nowhere.txt --model nowhere",
    "convert --to megatron --out x",
):
    sys.argv = ["osp", *line.split()]
    try:
        main()
    except SystemExit as end:
        assert end.code == (0 if "--help" in line else 2)
    else:
        raise AssertionError(line)"""
    assert heavy_modules(code) == "HEAVY"


def test_names() -> None:
    for name in opensoraplan.__all__:
        assert getattr(opensoraplan, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'WFVAEE'"):
        _ = opensoraplan.WFVAEE
