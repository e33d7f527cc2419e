"""`python -m opensoraplan` is `osp`."""

from opensoraplan.cli import main

main()
