"""`osp launch`: starts a command in several processes with torchrun."""

import os
import shlex
import sys
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional

from opensoraplan.cli.options import optional


@dataclass(frozen=True)
class Launch:
    """Run a command in several processes with torchrun: osp launch --processes 8 -- train RUN.toml

    With several machines, run the same command on each with its --node-rank. See docs/clusters.md.
    """

    command: Annotated[Positional[tuple[str, ...]], optional("-- VERB ...", "(required)")]
    """A verb of osp and its options, after --."""
    processes: int
    """Processes per machine, one for each device."""
    nodes: int = 1
    """Number of machines."""
    node_rank: Annotated[int | None, optional("INT")] = None
    """Number of this machine, counted from 0."""
    master: Annotated[str | None, optional("HOST:PORT")] = None
    """Address and free port of the first machine."""
    max_restarts: int = 0
    """How often all processes are restarted after one dies. Use it with --resume latest."""
    print: bool = False
    """Only print the torchrun command."""


def hint(words: list[str]) -> str | None:
    """What to do about unknown words: put -- before the command."""
    return "put the command after --: osp launch --processes 8 -- train RUN.toml" if words else None


def launch(options: Launch) -> None:
    """`osp launch`."""
    line = launch_line(options)
    if options.print:
        sys.stdout.write(shlex.join(line) + "\n")
        return
    os.execvp(line[0], line)


def launch_line(options: Launch) -> list[str]:
    """The torchrun command. Raises ValueError for impossible numbers."""
    from opensoraplan.parallel.ranks import OWN_STORE, SHUTDOWN

    for name, least in (("processes", 1), ("nodes", 1), ("max_restarts", 0)):
        value = getattr(options, name)
        if value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if not options.command:
        raise ValueError("no command is given, for example: osp launch --processes 8 -- train RUN.toml")
    line = ["env", f"{SHUTDOWN}=300", *([f"{OWN_STORE}=1"] if options.max_restarts else [])]
    line += [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={options.processes}"]
    if options.nodes == 1:
        if options.node_rank or options.master:
            raise ValueError("--node-rank and --master go with --nodes 2 or more")
        line.append("--standalone")
    else:
        line += _rendezvous_options(options)
    if options.max_restarts:
        line.append(f"--max-restarts={options.max_restarts}")
    return [*line, "-m", "opensoraplan", *options.command]


def _rendezvous_options(options: Launch) -> list[str]:
    """Options of torchrun for several machines."""
    rank, nodes = options.node_rank, options.nodes
    if rank is None or not 0 <= rank < nodes:
        got = "none" if rank is None else rank
        raise ValueError(f"with --nodes {nodes}, --node-rank must be 0 to {nodes - 1}, got {got}")
    host, _, port = (options.master or "").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(
            f"with --nodes {nodes}, --master must be HOST:PORT of the first machine, got {options.master}"
        )
    # c10d, since with torchrun's static rendezvous other machines do not learn that a process died.
    return [
        f"--nnodes={nodes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={options.master}",
        f"--rdzv-conf=is_host={str(rank == 0).lower()}",
        "--rdzv-id=osp",
    ]
