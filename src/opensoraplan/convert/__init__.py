"""Checkpoints in every dialect of Open-Sora Plan v1.5.0, in and out. The models
are in `opensoraplan.models`.
"""

from opensoraplan.formats.checkpoints import load_checkpoint, open_checkpoint

__all__ = ["load_checkpoint", "open_checkpoint"]
