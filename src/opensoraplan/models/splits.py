"""How tensor parallelism splits the denoiser's weights, as the original does: attention by heads,
feed-forwards by their inner width, AdaLN by its outputs. All other tensors are whole on every rank.
"""

ADALN = ("norm1.linear", "norm2.linear", "norm_out.linear")
# Linear layers whose outputs are split, in dimension 0 of weight and bias ...
_BY_OUTPUTS = (
    *(f"attn1.{name}" for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")),
    *("net.0.proj", *ADALN),
)
# ... or inputs, in dimension 1 of the weight; the bias is whole.
_BY_INPUTS = ("attn1.to_out.0", "attn1.to_add_out", "net.2")


def split_dimension(name: str) -> int | None:
    """The dimension in which ranks split the tensor of this name, the model's or the release's, or None."""
    layer, _, kind = name.rpartition(".")
    if layer.endswith(_BY_OUTPUTS):
        return 0
    return 1 if kind == "weight" and layer.endswith(_BY_INPUTS) else None
