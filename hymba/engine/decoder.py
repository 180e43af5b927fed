"""One token for every row of a batch, by the fastest way that this model and machine allow."""

from collections.abc import Callable

from torch import Tensor

from hymba import ops
from hymba.engine import cuda, native
from hymba.model.cache import HymbaCache
from hymba.model.hymba import Hymba

# ids (B,), a cache of B rows, which are advanced -> logits (B, V) float32 of the tokens that follow
Decoder = Callable[[Tensor, HymbaCache], Tensor]


def make_decoder(model: Hymba, max_batch: int, kind: str | None = None) -> Decoder:
    """A decoder for up to `max_batch` rows of a cache of this kind; make it after the weights are final."""
    kernels = ops.BACKENDS.get("native")
    if kernels is not None and ops.backend(model.norm.weight) is kernels and native.supports(model) is None:
        return native.NativeDecoder(model, max_batch).step
    kernels = ops.BACKENDS.get("gpu")
    if kernels is not None and ops.backend(model.norm.weight) is kernels and cuda.supports(model, kind) is None:
        return cuda.GraphDecoder(model, max_batch).step

    def decode(ids: Tensor, cache: HymbaCache) -> Tensor:
        hidden = model.hidden(ids[:, None].to(model.meta_tokens.device), cache=cache)
        return model.lm_head(hidden[:, -1]).float()

    return decode
