"""Models, ids and comparisons that the tests share."""

import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from hymba import Hymba, HymbaConfig

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_CASES = ("tiny-base", "tiny-nokv", "tiny-group3", "rope-default")

# Tensors here are too small to share between threads; tests of parallel code ask for more themselves.
torch.set_num_threads(1)

# Derandomised, so that a run is repeatable and a near tie of two logits cannot fail by chance one day.
# Examples cost milliseconds to seconds and share two cores, so they have no deadline.
settings.register_profile("hymba", derandomize=True, deadline=None, print_blob=True, max_examples=25)
settings.load_profile("hymba")

# Every part of the architecture at the smallest size: global layers at both ends, a pair that shares keys and values,
# a local layer of its own, several query heads to a key head, and a window that a short text crosses three times.
TINY = HymbaConfig(
    vocab_size=64, d_model=32, n_layers=5, n_heads=4, n_kv_heads=2, d_ff=48, d_state=4, dt_rank=3, n_meta=3, window=8,
    global_layers=(0, 4), kv_groups=((1, 2),), rope="ntk", max_length=64, rope_original_length=32,
)  # fmt: skip
WINDOW = TINY.window

# what a config may change; every law of the cache and of batching holds for each
VARIANTS = {
    "tiny": {},
    "group of three": {"kv_groups": ((1, 2, 3),)},
    "group with a global consumer": {"global_layers": (0, 2), "kv_groups": ((1, 2, 3),)},
    "group with a global producer": {"kv_groups": ((0, 1), (3, 4))},
    "every second layer reuses": {"global_layers": (2,), "kv_groups": ((0, 1), (2, 3))},
    "no sharing": {"kv_groups": ()},
    "no global layer": {"global_layers": ()},
    "no window": {"window": None, "global_layers": ()},
    "window of one": {"window": 1},
    "window beyond the context": {"window": 1000},
    "no meta tokens": {"n_meta": 0},
    "more meta tokens than window": {"n_meta": 11},
    "one key head": {"n_kv_heads": 1},
    "as many key heads as query heads": {"n_kv_heads": 4},
    "qk_norm rms": {"qk_norm": "rms"},
    "qk_norm perhead-rms": {"qk_norm": "perhead-rms"},
    "relu2": {"mlp_activation": "relu2"},
    "untied": {"tie_embeddings": False},
    "no rope": {"rope": "none", "rope_original_length": None},
    "plain rope": {"rope": "default", "rope_theta": 500.0, "rope_original_length": None},
    "dynamic_ntk": {"rope": "dynamic_ntk", "rope_original_length": 80},
    "wide conv": {"d_conv": 12},
    "no conv": {"d_conv": 1},
}
NO_ATTENTION = {"global_layers": (), "kv_groups": (), "rope": "none"}
# what Hymba is compared with (paper, tables 1 and 3), as far as it is no change above
OTHER_ARCHITECTURES = {
    "mamba": {"mixers": ("mamba",), "n_meta": 0, **NO_ATTENTION},
    "mamba with meta tokens": {"mixers": ("mamba",), **NO_ATTENTION},
    "mamba and one attention head": {"n_heads": 1, "n_kv_heads": 1, "d_head": 8},
    "mamba and two attention heads": {"n_heads": 2, "n_kv_heads": 1, "d_head": 8},
    "concat": {"fusion": "concat"},
    "concat of wider attention": {"fusion": "concat", "n_heads": 6, "d_head": 6, "qk_norm": "perhead-rms"},
    "attention": {"mixers": ("attention",), "n_meta": 0, "window": None, "global_layers": (), "kv_groups": ()},
    "attention with compressed keys": {"mixers": ("attention",)},
    "attention of other width": {"mixers": ("attention",), "d_head": 6},
    "mamba2": {"mixers": ("mamba2",), "d_ssm_head": 16, "d_ff": 0, **NO_ATTENTION},
    "mamba2 with MLP": {"mixers": ("mamba2",), "d_ssm_head": 32, "n_meta": 0, **NO_ATTENTION},
    "samba": {"mixers": ("mamba", "attention"), "global_layers": (), "kv_groups": ()},
    "mamba2 and attention": {"mixers": ("mamba2", "attention", "mamba2"), "d_ssm_head": 8, "global_layers": (1,),
                             "kv_groups": ((1, 4),)},
    "hybrid and attention": {"mixers": ("hybrid", "attention"), "kv_groups": ((0, 2), (1, 3))},
}  # fmt: skip
VARIANTS |= OTHER_ARCHITECTURES
each_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


def tiny_model(seed: int = 0, **changes) -> Hymba:
    """`TINY` with changes, in evaluation mode, with weights under which every part matters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Hymba(replace(TINY, **changes))
    randomise(model, seed)
    return model.eval()


@torch.no_grad()
def randomise(model: Hymba, seed: int = 0) -> None:
    """Weights as after training rather than before: activations of order one everywhere, norms and biases all
    different, and steps of the SSM from forgetting at once to remembering the whole text."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        x = torch.randn(parameter.shape, generator=generator)
        leaf = name.rpartition(".")[2]
        if "norm" in name:
            x = 1 + 0.3 * x
        elif leaf == "A_log":
            x = parameter + 0.3 * x
        elif leaf == "dt_bias":
            x = 1.5 * x - 2
        elif leaf not in ("meta_tokens", "conv_bias", "D") and not name.startswith("embedding"):
            x = x / math.sqrt(parameter.shape[-1])
        parameter.copy_(x)


def random_ids(batch: int, length: int, seed: int = 0, vocab_size: int = TINY.vocab_size) -> Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    """The largest difference is small beside the largest magnitude that is expected.

    2e-5 is a hundred roundings of float32: sums of a few dozen terms in another order, through a handful of layers.
    A mistake of structure (a window off by one, a state not passed on) moves these models by more than 1e-2.
    """
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    assert actual.isfinite().all()
    actual, expected = actual.detach().float(), expected.detach().float()
    error, limit = float((actual - expected).abs().max()), tolerance * float(expected.abs().max())
    assert error <= limit, f"differs by {error:.3g}, allowed {limit:.3g}"


def gradients(model: Hymba) -> dict[str, Tensor]:
    """Gradients that there are, taken away from the model."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(actual[name], gradient, tolerance)


def official_folder() -> Path:
    """The released config and parameter list: no part of this repository. Skips the test where they are not."""
    root = Path(os.environ.get("HYMBA_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    folder = root / "official" / "Hymba-1.5B-Base"
    if not (folder / "parameters.tsv").exists():
        pytest.skip("the files of the released checkpoint are not here; name their folder in HYMBA_SHARED")
    return folder
