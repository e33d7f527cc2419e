"""`osp cache --engine ray`: the shards of a feature cache encoded by Ray Data, for clusters where workers
come and go. The files are those of `write_cache`, byte for byte.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from opensoraplan.claims import is_claimed, share_in_passes
from opensoraplan.data import features
from opensoraplan.data.features import LeftOut
from opensoraplan.train.config import TrainSettings
from opensoraplan.train.inputs.cache import CacheJob, CacheSummary

Row = dict[str, Any]
# What a worker computes on: how Ray counts it, and what one worker takes of it.
_DEVICES: dict[str, tuple[str, Row]] = {
    "cuda": ("GPU", {"num_gpus": 1}),
    "npu": ("NPU", {"resources": {"NPU": 1}}),
    "cpu": ("CPU", {"num_cpus": 1}),
}


def write_cache_by_ray(
    settings: TrainSettings, out: Path, *, videos_per_shard: int = 64, texts_per_shard: int = 1024
) -> CacheSummary:
    """As `write_cache`, by workers of the Ray cluster that RAY_ADDRESS names or this machine belongs to, or
    of one that is begun here. All machines must have this package, and the same files under the same paths.

    There are as many workers as the cluster has devices for, and more as it grows; without `settings.device`,
    of the first kind of GPU, NPU and CPU that it has. A shard whose worker dies is encoded by another. Raises
    ValueError as `write_cache`, and without Ray.
    """
    ray = _import_ray()
    sizes = {"videos_per_shard": videos_per_shard, "texts_per_shard": texts_per_shard}
    # This process only asks what there is to do.
    job = CacheJob(settings.model_copy(update={"device": "cpu"}), out, **sizes)
    to_write: list[Row] = []
    total = 0
    for kind in features.KINDS:
        shards = range(job.description.shards(kind))
        there = set(job.written(kind, shards))
        to_write += [{"kind": kind, "shard": shard} for shard in shards if shard not in there]
        total += len(shards)

    def write(left: list[Row]) -> list[Row]:
        free = [row for row in left if not is_claimed(features.shard_path(out, row["kind"], row["shard"]))]
        busy = [row for row in left if row not in free]
        for row in _encoded(ray, settings, out, sizes, free, total=total) if free else ():
            if row["busy"]:
                busy.append({"kind": row["kind"], "shard": row["shard"]})
            job.encoded += row["encoded"]
            job.leave_out([LeftOut(*one) for one in json.loads(row["left_out"])])
        return busy

    if to_write:
        began = not ray.is_initialized()
        if began:
            ray.init(log_to_driver=False)
        try:
            share_in_passes(to_write, write, what="shards")
        finally:
            if began:
                ray.shutdown()
    return job.finish(written=job.encoded, present=total - job.encoded)


def _encoded(
    ray: Any,  # noqa: ANN401 (a module)
    settings: TrainSettings,
    out: Path,
    sizes: dict[str, int],
    to_write: list[Row],
    *,
    total: int,
) -> Iterator[Row]:
    """The rows of shards as workers finish them. Raises ValueError for what a user can help."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    there = ray.cluster_resources()
    device = (settings.device or "auto").partition(":")[0]
    if device == "auto":
        device = next(kind for kind, (name, _) in _DEVICES.items() if there.get(name))
    if device not in _DEVICES:
        raise ValueError(f"device {settings.device!r} is none of {', '.join(_DEVICES)}")
    name, needs = _DEVICES[device]
    fitting = min(int(there.get(name, 0)), len(to_write))
    pool = ray.data.ActorPoolStrategy(min_size=1, initial_size=max(1, fitting), max_size=len(to_write))
    worker = (settings.model_copy(update={"device": device}), out.absolute(), sizes, Path.cwd())
    # A block for each shard, so that no worker's death costs more than one.
    rows = ray.data.from_items(to_write, override_num_blocks=len(to_write))
    done = rows.map(_Worker, fn_constructor_args=worker, compute=pool, **needs)
    with tqdm(total=total, initial=total - len(to_write), desc="encoding", unit="shard") as bar:
        for row in done.iter_rows():
            if row["error"]:
                raise ValueError(row["error"])
            yield row
            bar.update()


class _Worker:
    """One process of the cluster, with encoders of its own. What a user can help, it returns as text."""

    def __init__(self, settings: TrainSettings, out: Path, sizes: dict[str, int], folder: Path) -> None:
        self.error = ""
        try:
            os.chdir(folder)  # where relative paths of the settings begin
            self.job = CacheJob(settings, out, **sizes)
        except (ValueError, OSError, MemoryError) as error:
            self.error = str(error) or "memory is full"

    def __call__(self, row: Row) -> Row:
        """Write one shard, unless another process is at it."""
        done: Row = {**row, "busy": False, "encoded": 0, "left_out": "[]", "error": self.error}
        if self.error:
            return done
        encoded, left_out = self.job.encoded, len(self.job.left_out)
        try:
            busy = self.job.write(row["kind"], [row["shard"]], one_more=_nothing)
        except (ValueError, OSError, MemoryError) as error:
            return done | {"error": str(error) or "memory is full"}
        return done | {
            "busy": bool(busy),
            "encoded": self.job.encoded - encoded,
            "left_out": json.dumps(self.job.left_out[left_out:]),
        }


def _nothing() -> None:
    """The driver counts shards."""


def _import_ray() -> Any:  # noqa: ANN401 (a module)
    try:
        import ray
        import ray.data
    except ImportError:
        raise ValueError("--engine ray needs Ray: pip install 'opensoraplan[ray]'") from None
    return ray
