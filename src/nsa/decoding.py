"""Decoding over a cache's fixed memory: append tokens, attend from the last ones; by the kernels where they serve."""

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from nsa.backend import Backend, resolve
from nsa.cache_tensors import CacheTensors, as_computed
from nsa.config import NSAConfig
from nsa.decode_step import DecodeStep
from nsa.ops import decode as ops
from nsa.streams import Branches

PhiWeights = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # of keys, of values

# New tokens, or queries, of a row in one call of the kernels; more are a chunk of prefill.
MAX_QUERIES = 16


def append_tokens(
    tensors: CacheTensors, new: Branches, config: NSAConfig, phi: PhiWeights, step: DecodeStep,
    *, backend: Backend | None = None,
) -> None:  # fmt: skip
    """`nsa.ops.decode.append_tokens`, or the kernels that do the same.

    The kernels read no length on the host, so they may be captured in a CUDA graph; a token without room is then
    not written, which the caller has to rule out beforehand.

    Under `torch.autocast` keys, values and phi's weights are cast to its dtype first, which the cache has to hold.
    """
    device = new.slc.k.device.type
    if torch.is_autocast_enabled(device):
        new = Branches.of_tokens(*as_computed(*new.tensors))
        phi_k, phi_v = (as_computed(new.slc.k, *of)[1:] for of in phi)
        phi = (phi_k, phi_v)
    k = new.slc.k
    if k.shape[1] <= MAX_QUERIES and _on_kernels(k, tensors, backend):
        from nsa.kernels import decode as kernels  # only where triton is installed

        kernels.append_tokens(tensors, new, config, phi, step)
    else:
        with torch.autocast(device, enabled=False):
            ops.append_tokens(tensors, new, config, phi, step)


def decode_attention(
    q: Float[Tensor, "b t h d"],
    gates: Float[Tensor, "b t h 3"],
    tensors: CacheTensors,
    config: NSAConfig,
    *,
    scale: float | None = None,
    counts: Int32[Tensor, " b"] | None = None,
    cos: Float[Tensor, "b t d"] | None = None,
    sin: Float[Tensor, "b t d"] | None = None,
    backend: Backend | None = None,
) -> Float[Tensor, "b t h e"]:
    """`nsa.ops.decode.decode_attention`, or the kernels that do the same in two launches of a fixed grid.

    A row's result does not depend on the other rows, nor on where its pages lie, bit by bit; nor does it change on
    repetition. Under `torch.autocast` queries are cast to its dtype first, as for `native_sparse_attention`.
    """
    (q,) = as_computed(q)
    if q.shape[1] <= MAX_QUERIES and _on_kernels(q, tensors, backend, scale):
        from nsa.kernels import decode as kernels  # only where triton is installed

        return kernels.decode_attention(q, gates, tensors, config, scale=scale, counts=counts, cos=cos, sin=sin)
    # The sums inside are fp32; autocast would round their terms.
    with torch.autocast(q.device.type, enabled=False):
        return ops.decode_attention(q, gates, tensors, config, scale=scale, counts=counts, cos=cos, sin=sin)


def _on_kernels(x: Tensor, tensors: CacheTensors, backend: Backend | None, scale: float | None = None) -> bool:
    # The window's ring has the shapes of the others.
    memory = (tensors.k, tensors.v, tensors.k_cmp, tensors.v_cmp)
    return resolve(x, *memory, scale=scale, backend=backend) == "triton"
