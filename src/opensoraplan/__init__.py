"""Open-Sora Plan v1.5.0 in plain PyTorch. Names are loaded on first use, so that
the import itself is fast.
"""

TYPE_CHECKING = False  # without typing, which takes long to import
if TYPE_CHECKING:
    from opensoraplan.data.video import write_video
    from opensoraplan.models.sparse_ummdit import SparseUMMDiT
    from opensoraplan.models.wfvae import WFVAE
    from opensoraplan.pipeline import OpenSoraPlanPipeline

__all__ = ["WFVAE", "OpenSoraPlanPipeline", "SparseUMMDiT", "write_video"]

_HOME = {
    "OpenSoraPlanPipeline": "opensoraplan.pipeline",
    "SparseUMMDiT": "opensoraplan.models.sparse_ummdit",
    "WFVAE": "opensoraplan.models.wfvae",
    "write_video": "opensoraplan.data.video",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
