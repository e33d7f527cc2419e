"""`python -m opensoraplan.cli` is `osp`."""

from opensoraplan.cli import main

main()
