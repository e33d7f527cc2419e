"""All speed benchmarks one after the other, into docs/performance.md: what `make bench` runs.

    python benchmarks/table.py               about half an hour on two CPU cores
    python benchmarks/table.py blocks vae    only these

What each one prints replaces what is between its two marks in the page.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

from opensoraplan.disk import write_whole

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
BENCHMARKS = {
    "blocks": ["blocks.py"],
    "compiled": ["blocks.py", "--compile"],
    "vae": ["vae_speed.py"],
    "peers": ["peers.py"],
    "growth": ["growth.py"],
}


def run(command: list[str]) -> str:
    """What a benchmark prints, while it is shown as it comes."""
    lines = []
    with subprocess.Popen(
        [sys.executable, HERE / command[0], *command[1:]], stdout=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout is not None
        for line in job.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            lines.append(line)
    if job.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return "".join(lines)


def put(page: str, name: str, text: str) -> str:
    """The page with `text` between the marks of `name`. A table needs an empty line before it."""
    text = re.sub(r"(?m)^([^|\n].*)\n(\|)", r"\1\n\n\2", text)
    text = re.sub(r"(?m)^(\|.*)\n([^|\n])", r"\1\n\n\2", text).strip()
    marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
    pattern = re.compile(f"{re.escape(marks[0])}.*?{re.escape(marks[1])}", re.DOTALL)
    if not pattern.search(page):
        raise SystemExit(f"{PAGE} has no place for {name}: {marks[0]} ... {marks[1]}")
    return pattern.sub(lambda _: f"{marks[0]}\n{text}\n{marks[1]}", page)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"of {', '.join(BENCHMARKS)}; default: all")
    names = parser.parse_args().names or list(BENCHMARKS)
    if unknown := set(names) - set(BENCHMARKS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    for name in names:
        command = BENCHMARKS[name]
        printed = run(command)
        page = put(PAGE.read_text(encoding="utf-8"), name, printed)
        write_whole(PAGE, lambda file, page=page: file.write_text(page, encoding="utf-8"))


if __name__ == "__main__":
    main()
