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


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["generate", "--help"],
        ["generate", "a cat"],
        ["generate", "a cat", "--model", "nowhere", "--frames", "10"],
        ["generate", "nowhere.txt", "--model", "."],
    ],
    ids=" ".join,
)
def test_help_and_mistakes(arguments: list[str]) -> None:
    code = f"""
from opensoraplan.cli import main
sys.argv = ["osp", *{arguments}]
try:
    main()
except SystemExit:
    pass"""
    assert heavy_modules(code) == "HEAVY"


def test_names() -> None:
    for name in opensoraplan.__all__:
        assert getattr(opensoraplan, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'WFVAEE'"):
        _ = opensoraplan.WFVAEE
