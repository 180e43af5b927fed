"""Every backend computes what `ops.reference` defines: outputs, final states and gradients.

Tolerances are relative to the largest magnitude of a tensor. float32: 1e-5, sums in another order. bfloat16: compared
with the float32 reference on the same numbers, so what is left is the rounding of results (2^-9 of each), and where it
says so, of intermediate results.
"""

import os
import shutil
import subprocess
import sys
import textwrap
from functools import cache

import pytest
import torch
from conftest import TINY, random_ids, tiny_model
from torch import Tensor

from hymba import ops
from hymba.csrc.build import build
from hymba.errors import UserError
from hymba.ops import chunked, library, reference
from hymba.visibility import EMPTY, KeyValue

FP32 = 1e-5
ROUNDED = 2**-8  # a result rounded once; a tie may go either way
ROUNDED_INSIDE = 2**-7  # softmax weights and their gradients, or a normed value, are rounded as well

needs_native = pytest.mark.skipif(not library.available(), reason=library.status())
# every instruction set of this machine; the best one with one thread and with two
BACKENDS = [("torch", 1), *((f"native-{isa}", 2) for isa in library.isas())]
BACKENDS += [(f"native-{isa}", 1) for isa in library.isas()[:1]]


@pytest.fixture(params=BACKENDS, ids=[f"{name}-{n}-threads" for name, n in BACKENDS])
def backend(request, monkeypatch):
    """A backend's module. The native one takes threads for tiny tensors too."""
    name, n = request.param
    name, _, isa = name.partition("-")
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    if name == "torch":
        yield chunked
    else:
        from hymba.ops import native

        monkeypatch.setattr(native, "ALONE", 0)
        best = library.isa()
        library.use_isa(isa)
        yield native
        library.use_isa(best)
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    """`torch.empty` gives NaN, so that an element that a kernel forgets shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def run(function, inputs, dtype=None):
    """Outputs and the gradients of all float inputs for fixed, random gradients of the outputs.

    inputs: tensors, lists of them or of `KeyValue`, others; dtype: cast the float tensors to it first.
    """
    leaves = []

    def leaf(x):
        if isinstance(x, list):
            return [leaf(y) for y in x]
        if isinstance(x, KeyValue):
            return KeyValue(*map(leaf, x))
        if isinstance(x, Tensor) and x.is_floating_point():
            x = (x if dtype is None else x.to(dtype)).detach().requires_grad_()
            leaves.append(x)
        return x

    outputs = function(*map(leaf, inputs))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    # gradients of the outputs that bfloat16 holds exactly: they are to be the same for every type
    gradients = [torch.randn(y.shape, generator=generator).bfloat16().float().to(y.device) for y in outputs]
    loss = sum((y.float() * g).sum() for y, g in zip(outputs, gradients, strict=True))
    return [*outputs, *torch.autograd.grad(loss, leaves)]


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert actual.shape == expected.shape, what
    assert actual.isfinite().all(), f"{what} is not finite"
    largest = expected.abs().max() if expected.numel() else 0
    error = (actual.double() - expected.double()).abs().max() if expected.numel() else 0
    assert error <= tolerance * largest + 1e-30, f"{what}: {error / largest:.1e}"


@cache
def case(name: str, make, *arguments):
    """Inputs that `make` draws, and what the reference computes from them, in float32 and from their bfloat16."""
    torch.manual_seed(0)
    inputs = make(*arguments)
    low = [_bf16(x) for x in inputs]
    definition = getattr(reference, name)
    return inputs, run(definition, inputs), low, run(definition, low, torch.float32)


def assert_as_reference(backend, tolerance: float, name: str, make, *arguments) -> None:
    """tolerance: for bfloat16"""
    function = getattr(backend, name)
    inputs, expected, low, expected_low = case(name, make, *arguments)
    for i, (a, b) in enumerate(zip(run(function, inputs), expected, strict=True)):
        assert_near(a, b, FP32, f"{name} float32, tensor {i}")
    with torch.no_grad():  # another path: nothing is kept for a backward pass
        y = function(*inputs)
        assert_near(y[0] if isinstance(y, tuple) else y, expected[0], FP32, f"{name} without gradients")
    if backend is chunked:  # autograd rounds each part of the gradient of what is used in several places
        tolerance = max(tolerance, ROUNDED_INSIDE)
    for i, (a, b) in enumerate(zip(run(function, low), expected_low, strict=True)):
        assert_near(a, b, tolerance, f"{name} bfloat16, tensor {i}")


def _bf16(x):
    if isinstance(x, list):
        return [_bf16(y) for y in x]
    if isinstance(x, KeyValue):
        return KeyValue(*map(_bf16, x))
    return x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x


# ------------------------------------------------------------------------------------------------------------- the scan


def scan_inputs(B, T, E, N, shared=True, documents=False, padded=False):
    """u, gate, B and C are views of one projection, as in the model."""
    wide = randn(B, T, 2 * E + 2 * N + 3)
    u, gate, Bt, Ct, _ = wide.split([E, E, N, N, 3], dim=-1)
    A = -torch.rand(E, N) * 8
    state = randn(1 if shared else B, E, N)
    starts = lengths = None
    if documents:
        starts = torch.rand(B, T) < 0.1
        starts[0, 0], starts[-1, -1] = True, True
    if padded:
        lengths = torch.tensor([T, 0, T // 2])[:B]
    return [u, randn(B, T, E), randn(E) - 2, A, Bt, Ct, randn(E), gate, state, starts, lengths]


@pytest.mark.parametrize(
    ("B", "T", "E", "N"),
    [(1, 1, 16, 16), (2, 2, 7, 1), (2, 63, 37, 16), (1, 1000, 5, 4), (2, 70, 40, 8), (1, 65, 17, 33), (3, 32, 1, 5)],
)
def test_scan(backend, B, T, E, N):
    assert_as_reference(backend, ROUNDED, "selective_scan", scan_inputs, B, T, E, N, T % 2 == 0)


@pytest.mark.parametrize("T", [1, 40, 100])
@pytest.mark.parametrize(("documents", "padded"), [(True, False), (False, True), (True, True)])
def test_scan_of_documents_and_padding(backend, T, documents, padded):
    assert_as_reference(backend, ROUNDED, "selective_scan", scan_inputs, 3, T, 20, 16, False, documents, padded)


@pytest.mark.parametrize("dt", [-1e4, -80.0, -20.0, 20.0, 80.0, 1e4])
@pytest.mark.parametrize("A", [0.0, -1e-6, -1.0, -1e6])
def test_scan_at_extremes(backend, dt, A):
    torch.manual_seed(0)
    inputs = scan_inputs(1, 40, 17, 4)
    inputs[1], inputs[3] = torch.full_like(inputs[1], dt), torch.full_like(inputs[3], A)
    inputs[7] = inputs[7] * 100  # gates at which the exponential overflows
    results = zip(run(backend.selective_scan, inputs), run(reference.selective_scan, inputs), strict=True)
    for i, (a, b) in enumerate(results):
        assert_near(a, b, FP32, f"tensor {i}")


def test_scan_of_infinite_decay(backend):
    inputs = scan_inputs(1, 3, 4, 4)
    inputs[1], inputs[3] = torch.full_like(inputs[1], 1e30), torch.full_like(inputs[3], -1e30)  # exp(-infinity)
    inputs[0] = inputs[0] * 1e-30
    with torch.no_grad():
        for a, b in zip(backend.selective_scan(*inputs), reference.selective_scan(*inputs), strict=True):
            assert_near(a, b, FP32, "output")


def test_exponential(backend):
    """Where nothing drives it, one step multiplies the state by exp(delta A)."""
    x = torch.linspace(0, 80, 4001)[:, None]
    E, zero = len(x), torch.zeros(1, 1, len(x))
    one = torch.ones(1, 1, 1)
    delta = torch.full((1, 1, E), 32.0)  # softplus(32) is 32
    _, h = backend.selective_scan(
        zero, delta, torch.zeros(E), -x / 32, one, one, torch.zeros(E), zero, torch.ones(1, E, 1)
    )
    exact = torch.exp(-x.double())
    # 2e-7 of the polynomial, and half a unit in the last place of the argument, twice
    assert ((h[0].double() / exact - 1).abs() <= 2e-7 + 1.2e-7 * x.double()).all()


# ------------------------------------------------------------------------------------------- the recurrence of Mamba-2


def ssd_inputs(B, T, S, P, N, shared=True, documents=False, padded=False):
    """x, B and C are views of what the convolution gives, as in the model."""
    x, Bt, Ct = randn(B, T, S * P + 2 * N).split([S * P, N, N], dim=-1)
    starts = lengths = None
    if documents:
        starts = torch.rand(B, T) < 0.1
        starts[0, 0], starts[-1, -1] = True, True
    if padded:
        lengths = torch.tensor([T, 0, T // 2])[:B]
    state = randn(1 if shared else B, S, P, N)
    return [x.unflatten(-1, (S, P)), randn(B, T, S), randn(S) - 2, -torch.rand(S) * 8, Bt, Ct, randn(S),
            randn(B, T, S, P), state, starts, lengths]  # fmt: skip


SSD_SIZES = [(1, 1, 2, 8, 16), (2, 63, 3, 5, 7), (1, 64, 1, 4, 4), (2, 65, 2, 3, 1), (1, 200, 2, 4, 8)]
SSD_KINDS = [(True, False), (False, True), (True, True)]


@pytest.mark.parametrize(("B", "T", "S", "P", "N"), SSD_SIZES)
def test_ssd(backend, B, T, S, P, N):
    assert_as_reference(backend, ROUNDED_INSIDE, "ssd", ssd_inputs, B, T, S, P, N, T % 2 == 0)


@pytest.mark.parametrize("T", [1, 40, 100])
@pytest.mark.parametrize(("documents", "padded"), SSD_KINDS)
def test_ssd_of_documents_and_padding(backend, T, documents, padded):
    assert_as_reference(backend, ROUNDED_INSIDE, "ssd", ssd_inputs, 3, T, 3, 4, 8, False, documents, padded)


@pytest.mark.parametrize(("documents", "padded"), SSD_KINDS)
def test_ssd_in_segments(documents, padded, monkeypatch):
    monkeypatch.setattr(chunked, "SSD_CHUNK", 8)
    monkeypatch.setattr(chunked, "SSD_SEGMENT", 32)
    assert_as_reference(chunked, ROUNDED, "ssd", ssd_inputs, 3, 100, 3, 4, 8, False, documents, padded)


@pytest.mark.parametrize("dt", [-1e4, -80.0, -20.0, 20.0, 80.0, 1e4])
@pytest.mark.parametrize("A", [0.0, -1e-6, -1.0, -1e6])
def test_ssd_at_extremes(backend, dt, A):
    torch.manual_seed(0)
    inputs = ssd_inputs(1, 40, 2, 5, 4)
    inputs[1], inputs[3] = torch.full_like(inputs[1], dt), torch.full_like(inputs[3], A)
    results = zip(run(backend.ssd, inputs), run(reference.ssd, inputs), strict=True)
    for i, (a, b) in enumerate(results):
        assert_near(a, b, FP32, f"tensor {i}")


def test_ssd_remembers_exactly_after_it_forgot(backend):
    """A step that forgets all, then steps that forget little: sums over the chunk would be too large to be exact."""
    torch.manual_seed(0)
    inputs = ssd_inputs(1, 60, 2, 5, 4)
    inputs[1], inputs[3] = torch.full_like(inputs[1], -6.0), torch.full_like(inputs[3], -1.0)
    inputs[1][:, 5] = 1e5
    for a, b in zip(run(backend.ssd, inputs), run(reference.ssd, inputs), strict=True):
        assert_near(a, b, FP32, "tensor")


def test_ssd_is_a_selective_scan_whose_channels_share_their_decay():
    torch.manual_seed(0)
    B, T, S, P, N = 3, 70, 3, 4, 8
    x, dt, dt_bias, A, Bt, Ct, D, gate, state, starts, lengths = ssd_inputs(B, T, S, P, N, False, True, True)
    channels = lambda x: x.repeat_interleave(P, dim=-1)  # noqa: E731
    y, last = reference.selective_scan(
        x.flatten(2), channels(dt), channels(dt_bias), channels(A)[:, None].expand(-1, N), Bt, Ct, channels(D),
        gate.flatten(2), state.flatten(1, 2), starts, lengths,
    )  # fmt: skip
    mine = reference.ssd(x, dt, dt_bias, A, Bt, Ct, D, gate, state, starts, lengths)
    assert_near(mine[0].flatten(2), y, FP32, "y")
    assert_near(mine[1].flatten(1, 2), last, FP32, "last state")


# -------------------------------------------------------------------------------------------------------- convolution


def conv_inputs(B, T, E, K, shared, documents):
    starts = torch.rand(B, T) < 0.3 if documents else None
    x = randn(B, T, E + 5)[..., :E]
    return [x, randn(E, K), randn(E), randn(1 if shared else B, K - 1, E), starts]


@pytest.mark.parametrize(
    ("B", "T", "E", "K"), [(1, 1, 16, 4), (2, 2, 7, 4), (2, 63, 130, 4), (1, 9, 3, 12), (2, 5, 65, 2)]
)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("documents", [False, True])
def test_conv(backend, B, T, E, K, shared, documents):
    assert_as_reference(backend, ROUNDED, "causal_conv", conv_inputs, B, T, E, K, shared, documents)


# -------------------------------------------------------------------------------------------------------------- norms


def norm_inputs(x, weight):
    return [randn(*x), randn(*weight), 1e-6]


def head_norm_inputs(*weight):
    """Queries are normed as a transposed view."""
    return [randn(2, 9, 6, 8).transpose(1, 2), randn(*weight), 1e-6]


def mean_inputs(E):
    attn, ssm = ([randn(1, 4, E), randn(2, 3, E)] for _ in range(2))  # meta tokens and a text
    return [attn, ssm, randn(E), randn(E), 1e-6]


@pytest.mark.parametrize(
    ("x", "weight"),
    [((2, 3, 70), (70,)), ((1600,), (1600,)), ((2, 5, 3, 7), (1, 5, 1, 7)), ((2, 1, 2), (2,))],
)
def test_rms_norm(backend, x, weight):
    assert_as_reference(backend, ROUNDED_INSIDE, "rms_norm", norm_inputs, x, weight)


@pytest.mark.parametrize("weight", [(8,), (1, 6, 1, 8)])
def test_rms_norm_of_heads(backend, weight):
    assert_as_reference(backend, ROUNDED_INSIDE, "rms_norm", head_norm_inputs, *weight)


@pytest.mark.parametrize("E", [2, 33, 3200])
def test_mean_of_norms(backend, E):
    # four roundings, as in the reference on bfloat16: of each normed value, and of each product
    assert_as_reference(backend, 2 * ROUNDED_INSIDE, "mean_of_norms", mean_inputs, E)


@pytest.mark.parametrize("x_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_type", [torch.float32, torch.bfloat16])
def test_rms_norm_of_mixed_types(backend, x_type, weight_type):
    torch.manual_seed(0)
    inputs = [randn(3, 5, 40, dtype=x_type).transpose(0, 1), randn(40, dtype=weight_type), 1e-5]
    actual, expected = backend.rms_norm(*inputs), reference.rms_norm(*inputs)
    assert actual.dtype == expected.dtype
    assert_near(actual, expected, FP32 if actual.dtype == torch.float32 else ROUNDED, "y")


# ---------------------------------------------------------------------------------------------------------- attention


def attention_inputs(B, H, G, T, dk, dv, n_meta, window, cached=0, empty=0, documents=False):
    """Meta keys that the batch shares, a ring in any order with empty slots, the new keys; views as in the model."""
    positions = (n_meta + cached + torch.arange(T))[None]
    owners = None
    if documents:
        owners = (torch.rand(B, T) < 0.1).cumsum(1)
        begins = torch.ones(B, T, dtype=torch.bool)
        begins[:, 1:] = owners[:, 1:] != owners[:, :-1]
        time = torch.arange(T).expand(B, T)
        positions = n_meta + time - torch.where(begins, time, 0).cummax(1).values
    sources = []
    if n_meta:
        sources.append(KeyValue(randn(1, G, n_meta, dk), randn(1, G, n_meta, dv), torch.arange(n_meta)[None]))
    if cached:
        ring = n_meta + torch.stack([torch.randperm(cached) for _ in range(B)])
        ring[:, cached - empty :] = EMPTY
        sources.append(KeyValue(randn(B, G, cached, dk), randn(B, G, cached, dv), ring))
    heads = lambda n, d: randn(B, T, n * d + 1)[..., : n * d].unflatten(-1, (n, d)).transpose(1, 2)  # noqa: E731
    sources.append(KeyValue(heads(G, dk), heads(G, dv), positions, owners))
    return [heads(H, dk), positions, owners, sources, window, n_meta, dk**-0.5]


@pytest.mark.parametrize(
    "shape",
    [
        (1, 2, 1, 8, 16, 32, 0, None),
        (2, 6, 2, 63, 7, 13, 5, 10),  # nothing divides anything
        (1, 5, 1, 200, 64, 128, 128, 20),  # the released head sizes; blocks that nobody sees
        (1, 2, 2, 1000, 8, 16, 0, 300),
        (2, 4, 2, 150, 24, 40, 9, 30, 0, 0, True),  # documents
        (2, 4, 4, 70, 3, 6, 0, None, 0, 0, True),
        (1, 150, 1, 3, 8, 8, 4, None),  # more heads than a block has rows
        (2, 10, 5, 1, 64, 128, 16, 100, 200, 30),  # decoding: a ring with empty slots
        (1, 5, 1, 1, 64, 128, 128, None, 1500, 0),  # a range of keys for each thread
        (2, 10, 5, 2, 64, 128, 16, 100, 701, 30),
        (1, 4, 2, 1, 16, 32, 1, 4),  # two keys
    ],
)
def test_attention(backend, shape):
    assert_as_reference(backend, ROUNDED_INSIDE, "attention", attention_inputs, *shape)


def test_a_query_that_sees_nothing(backend):
    torch.manual_seed(0)
    inputs = attention_inputs(1, 2, 1, 5, 8, 16, 0, None)
    inputs[1] = inputs[1] - 3  # positions of the queries; the first three keys lie in everyone's future
    y, *grads = run(backend.attention, inputs)
    assert y.isfinite().all() and all(g.isfinite().all() for g in grads)
    assert_near(y[:, 3:], reference.attention(*inputs)[:, 3:], FP32, "queries that see")


def test_attention_of_large_scores(backend):
    """exp must not overflow, and far smaller scores count for nothing."""
    torch.manual_seed(0)
    inputs = attention_inputs(1, 4, 2, 40, 16, 32, 3, 20)
    inputs[0] = inputs[0] * 1000
    # scores of 1e4 are themselves 1e-3 wide
    assert_near(backend.attention(*inputs), reference.attention(*inputs), 1e-3, "y")


# ---------------------------------------------------------------------------------------------------------- promises


@pytest.mark.parametrize("module", [chunked, reference])
def test_autocast_changes_nothing_inside(module):
    """It would round the factors of products, and a score of bfloat16 cannot hold the value that masks one."""
    torch.manual_seed(0)
    for name, inputs in (
        ("attention", attention_inputs(2, 4, 2, 9, 8, 16, 3, 4, documents=True)),
        ("ssd", ssd_inputs(2, 9, 3, 4, 8)),
    ):
        function = getattr(module, name)

        def under_autocast(*inputs, function=function):
            with torch.autocast("cpu", torch.bfloat16):
                return function(*inputs)

        for a, b in zip(run(under_autocast, inputs), run(function, inputs), strict=True):
            assert torch.equal(a, b), name


@needs_native
def test_bit_equal_from_run_to_run_and_forward_for_any_threads(monkeypatch):
    from hymba.ops import native

    monkeypatch.setattr(native, "ALONE", 0)
    torch.manual_seed(0)
    cases = [
        (native.selective_scan, scan_inputs(2, 100, 80, 16)),
        (native.causal_conv, [randn(2, 50, 90), randn(90, 4), randn(90), randn(1, 3, 90), None]),
        (native.mean_of_norms, mean_inputs(70)),
        (native.attention, attention_inputs(1, 10, 5, 90, 16, 32, 8, 30)),
        (native.attention, attention_inputs(1, 10, 5, 1, 16, 32, 8, None, cached=1300)),
    ]
    before = torch.get_num_threads()
    try:
        for function, inputs in cases:
            torch.set_num_threads(1)
            with torch.no_grad():
                alone = function(*inputs)
            for n in (2, 3):
                torch.set_num_threads(n)
                first = run(function, inputs)
                for _ in range(3):
                    assert all(torch.equal(a, b) for a, b in zip(run(function, inputs), first, strict=True))
                alone = alone if isinstance(alone, tuple) else (alone,)
                assert all(torch.equal(a, b) for a, b in zip(alone, first, strict=False))
    finally:
        torch.set_num_threads(before)


@needs_native
def test_operators_of_compiled_code_are_the_kernels():
    from hymba.ops import compiled, native

    torch.manual_seed(0)
    cases = {
        "selective_scan": scan_inputs(2, 40, 20, 4),
        "causal_conv": [randn(2, 5, 9), randn(9, 4), randn(9), randn(1, 3, 9), None],
        "rms_norm": [randn(2, 3, 9), randn(9), 1e-6],
        "mean_of_norms": mean_inputs(7),
        "attention": attention_inputs(2, 4, 2, 30, 8, 16, 3, 9),
    }
    for name, inputs in cases.items():
        expected = run(getattr(native, name), inputs)
        for a, b in zip(run(getattr(compiled, name), inputs), expected, strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("name", [name for name in ops.BACKENDS if name != "reference"])
def test_the_model_computes_the_same(name):
    model, ids = tiny_model(), random_ids(2, 3 * TINY.window)

    def everything():
        model.zero_grad()
        loss = model(ids, labels=ids)
        loss.backward()
        return [model(ids), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    with ops.use_backend("reference"):
        expected = everything()
    with ops.use_backend(name):
        for a, b in zip(everything(), expected, strict=True):
            assert_near(a, b, 3 * FP32, name)  # five layers deep


def python(code: str, **environment: str) -> str:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_native
def test_environment_chooses_instruction_set_and_backend():
    isa = library.isas()[-1]
    assert python("from hymba.ops import library; print(library.isa())", HYMBA_ISA=isa) == isa
    code = "import torch; from hymba import ops; print(ops.backend(torch.ones(1)).__name__, ops.describe())"
    assert python(code, HYMBA_BACKEND="reference").startswith("hymba.ops.reference")
    assert python(code).startswith("hymba.ops.native")
    with pytest.raises(UserError, match="choose from"):
        library.use_isa("mmx")
    with pytest.raises(UserError, match="available here"), ops.use_backend("cuda-graphs"):
        pass


def test_without_the_library_plain_pytorch_computes(tmp_path):
    code = "import torch; from hymba import ops; print(ops.backend(torch.ones(1)).__name__, ops.describe())"
    said = python(code, HYMBA_LIBRARY=str(tmp_path / "none.so"))
    assert said.startswith("hymba.ops.chunked") and "cannot be loaded" in said


@needs_native
def test_kernels_run_in_a_forked_process():
    """The child of a fork has none of its parent's threads."""
    code = """
        import os, torch
        from hymba import ops
        torch.set_num_threads(2)
        x, w = torch.randn(300, 400), torch.ones(400)
        y = ops.rms_norm(x, w, 1e-6)
        child = os.fork()
        if child == 0:
            # compared without PyTorch, whose own threads do not survive a fork
            os._exit(0 if ops.rms_norm(x, w, 1e-6).numpy().tobytes() == y.numpy().tobytes() else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """
    assert python(code) == "0"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("aarch64-linux-gnu-g++"), reason="needs Debian's g++-aarch64-linux-gnu")
def test_the_kernels_compile_for_arm(tmp_path):
    library = build(tmp_path / "libhymba.so", tmp_path, flags="-Werror", compiler="aarch64-linux-gnu-g++")
    assert library.read_bytes()[18:20] == b"\xb7\0"  # the ELF header's machine: EM_AARCH64


@needs_native
def test_other_types_and_devices_take_another_path():
    assert ops.backend(torch.ones(1, dtype=torch.float16)) is chunked
    assert ops.backend(torch.ones(1, device="meta")) is chunked


# ---- loss


@pytest.mark.parametrize(("rows", "V"), [(1, 1), (3, 5), (7, 16), (33, 999), (2, 4099)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cross_entropy_and_its_gradient(backend, rows, V, dtype):
    torch.manual_seed(rows)
    logits = (5 * torch.randn(rows, V)).to(dtype)
    targets = torch.randint(V, (rows,))
    targets[rows // 2] = -100
    logits[0, : V // 2] += 1e4  # exponentials far outside of float32
    expected = logits.clone().float()
    losses = reference.cross_entropy_(expected, targets, -100)
    leaf = logits.float().requires_grad_()
    plain = torch.nn.functional.cross_entropy(leaf, targets, ignore_index=-100, reduction="none")
    plain.sum().backward()
    assert_near(losses, plain.detach(), FP32, "the definition")
    assert_near(expected, leaf.grad, FP32, "the definition's gradient")
    ours = logits.clone()
    assert_near(backend.cross_entropy_(ours, targets, -100), losses, FP32, "losses")
    assert_near(ours, expected, FP32 if dtype == torch.float32 else ROUNDED, "gradient")


@needs_native
def test_cross_entropy_refuses_targets_outside_the_vocabulary():
    from hymba.ops import native

    for target in (-1, 7):
        with pytest.raises(UserError, match="from 0 to 6"):
            native.cross_entropy_(torch.zeros(1, 7), torch.tensor([target]), -100)
