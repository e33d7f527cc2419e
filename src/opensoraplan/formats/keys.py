"""Name tables of the checkpoint dialects. Nothing here reads or writes a file; nesting by stage is in
models/original.py.
"""

# MindSpeed-MM 2.x -> release, inside an attention module.
MINDSPEED_ATTENTION = {
    "proj_q": "to_q",
    "proj_k": "to_k",
    "proj_v": "to_v",
    "added_proj_q": "add_q_proj",
    "added_proj_k": "add_k_proj",
    "added_proj_v": "add_v_proj",
    "norm_proj_q": "norm_q",
    "norm_proj_k": "norm_k",
    "norm_added_proj_q": "norm_added_q",
    "norm_added_proj_k": "norm_added_k",
    "proj_out": "to_out.0",
    "added_proj_out": "to_add_out",
}
ATTENTION = ".attn1."

# How tensor parallelism splits the release's tensors: by output rows, by input columns, or not at all.
SPLIT_ROWS = (
    *(f"{ATTENTION}{name}." for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")),
    ".net.0.proj.",
    ".norm1.linear.",
    ".norm2.linear.",
)
SPLIT_ROWS_AT_TOP = ("norm_out.linear.",)
SPLIT_COLUMNS = (f"{ATTENTION}to_out.0.weight", f"{ATTENTION}to_add_out.weight", ".net.2.weight")


def release_name(name: str) -> str:
    """The release's name of a tensor that may have MindSpeed-MM's name."""
    before, found, rest = name.partition(ATTENTION)
    if not found:
        return name
    module, _, leaf = rest.rpartition(".")
    return f"{before}{ATTENTION}{MINDSPEED_ATTENTION.get(module, module)}.{leaf}"


def is_mindspeed(name: str) -> bool:
    """Whether this is a name that only MindSpeed-MM 2.x writes."""
    before, found, rest = name.partition(ATTENTION)
    return bool(before and found) and rest.rpartition(".")[0] in MINDSPEED_ATTENTION


def split_dimension(name: str) -> int | None:
    """The dimension in which tensor parallelism splits a tensor of this release name; None: every rank has it
    whole.
    """
    if name.startswith(SPLIT_ROWS_AT_TOP) or any(part in name for part in SPLIT_ROWS):
        return 0
    return 1 if name.endswith(SPLIT_COLUMNS) else None
