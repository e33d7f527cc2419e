"""`osp cache --engine ray`: the shards of a feature cache encoded by Ray Data, for clusters where workers
come and go. The files are those of `write_cache`, byte for byte.
"""

import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from opensoraplan.data import features
from opensoraplan.data.features import Kind, LeftOut
from opensoraplan.device import resolve_device
from opensoraplan.train.cache import CacheJob, CacheSummary, check_limit
from opensoraplan.train.config import TrainSettings

Row = dict[str, Any]
# What one worker takes of a cluster.
_NEEDS = {"cuda": {"num_gpus": 1}, "npu": {"resources": {"NPU": 1}}, "cpu": {"num_cpus": 1}}
_COUNTED = {"cuda": "GPU", "npu": "NPU", "cpu": "CPU"}


def write_cache_by_ray(
    settings: TrainSettings, out: Path, *, videos_per_shard: int = 64, texts_per_shard: int = 1024
) -> CacheSummary:
    """As `write_cache`, by workers of the Ray cluster that RAY_ADDRESS names or this machine belongs to, or
    of one that is begun here. All machines must have this package, and `out` and the data on a shared disk.

    There are as many workers as the cluster has devices for, and more as it grows. A shard whose worker dies
    is encoded by another. Raises ValueError as `write_cache`, and without Ray.
    """
    ray = _import_ray()
    sizes = {"videos_per_shard": videos_per_shard, "texts_per_shard": texts_per_shard}
    job = CacheJob(settings, out, **sizes)
    kinds: tuple[Kind, ...] = ("texts", "videos")
    rows = [{"kind": kind, "shard": shard} for kind in kinds for shard in range(job.description.shards(kind))]
    there = [row for row in rows if features.is_written(out, row["kind"], row["shard"])]
    to_write = [row for row in rows if row not in there]
    left_out = features.read_left_out(out, [row["shard"] for row in there if row["kind"] == "videos"])
    limit = settings.data.max_bad_files
    check_limit(left_out, limit=limit)
    if to_write:
        ray.init(ignore_reinit_error=True, log_to_driver=False)
        ray.data.DataContext.get_current().enable_progress_bars = False
        device = resolve_device(settings.device).type
        fitting = int(ray.cluster_resources().get(_COUNTED[device], 0))
        pool = ray.data.ActorPoolStrategy(
            min_size=1, initial_size=max(1, min(fitting, len(to_write))), max_size=len(to_write)
        )
        # A block for each shard, so that no worker's death costs more than one.
        encoded = ray.data.from_items(to_write, override_num_blocks=len(to_write)).map(
            _Worker,
            fn_constructor_args=(settings, out.absolute(), sizes),
            compute=pool,
            **_NEEDS[device],
        )
        with tqdm(total=len(rows), initial=len(there), desc="encoding", unit="shard") as bar:
            for row in encoded.iter_rows():
                if row["error"]:
                    raise ValueError(row["error"])
                left_out += [LeftOut(*one) for one in json.loads(row["left_out"])]
                check_limit(left_out, limit=limit)
                bar.update()
    return job.finish(written=len(to_write), present=len(there), left_out=left_out)


class _Worker:
    """One process of the cluster, with encoders of its own."""

    def __init__(self, settings: TrainSettings, out: Path, sizes: dict[str, int]) -> None:
        self.job = CacheJob(settings, out, **sizes)

    def __call__(self, row: Row) -> Row:
        """Write one shard; what a user can help comes back as text."""
        left_out: list[LeftOut] = []
        try:
            if row["kind"] == "texts":
                self.job.write_texts([row["shard"]], _nothing)
            else:
                left_out = self.job.write_videos([row["shard"]], _nothing)
        except (ValueError, OSError) as error:
            return {**row, "left_out": "[]", "error": str(error)}
        return {**row, "left_out": json.dumps(left_out), "error": ""}


def _nothing() -> None:
    """The driver counts shards."""


def _import_ray() -> Any:  # noqa: ANN401 (a module)
    try:
        import ray
        import ray.data
    except ImportError:
        raise ValueError("--engine ray needs Ray: pip install 'opensoraplan[ray]'") from None
    return ray
