"""Name tables of the checkpoint dialects. Nothing here reads or writes a file; nesting by stage
is in models/original.py.
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
