"""One video made by all processes of a job: `osp generate` under torchrun.

Guidance's branches, a sample's tokens and every layer are shared out, then the rows of frames. The mesh is
that of training; what are replicas there are the branches here.
"""

import logging
from collections.abc import Collection

import torch.distributed as dist

from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.models.vae import VideoVAE
from opensoraplan.parallel.apply import share_sample
from opensoraplan.parallel.branches import share_branches
from opensoraplan.parallel.decode import can_be_shared, share_decoding
from opensoraplan.parallel.mesh import REPLICATE, Mesh, MeshSettings

logger = logging.getLogger(__name__)


def generating_mesh(*, branches: int, tp: int) -> MeshSettings:
    """Branches x sp x tp, sp being what the number of processes leaves."""
    return MeshSettings(dp_replicate=branches, dp_shard=1, sp=-1, tp=tp)


def share_generating(model: SparseUMMDiT, vae: VideoVAE, mesh: Mesh, *, rows: Collection[int]) -> bool:
    """Share the work on each video out over `mesh`. Returns whether decoding is shared, too: then all
    processes must decode. It is if they can have equal shares of so many `rows` of latents, by the WF-VAE.

    Raises ValueError for a mesh that does not fit the model.
    """
    mesh.settings.check_model(model.config["num_attention_heads"])
    share_sample(model, mesh)
    if mesh.size(REPLICATE) > 1:
        share_branches(model, mesh.group(REPLICATE))
    ranks = dist.get_world_size()
    uneven = [count for count in rows if count % ranks]
    if uneven or vae.tiling is not None or not can_be_shared(vae):
        why = "frames are tiled" if vae.tiling is not None else f"{type(vae).__name__} decodes whole frames"
        why = f"{uneven[0]} rows of latents are not {ranks} equal shares" if uneven else why
        logger.info("%s: the first process decodes alone", why)
        return False
    assert dist.group.WORLD is not None
    share_decoding(vae, dist.group.WORLD)
    return True
