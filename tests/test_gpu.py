"""The Triton kernels compute what `ops.reference` defines: on a GPU, or in Triton's interpreter on a machine without.

Tolerances as in `test_ops.py`, but for bfloat16 in the interpreter, which cuts numbers off where a GPU rounds them, at
twice the error. The interpreter runs every program in turn, so sizes are small: odd ones, that cross
tiles and groups. It needs the package `triton`, which PyTorch brings along on machines with a GPU only.
"""

import ctypes
import os
import shutil
import subprocess
import weakref
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from conftest import random_ids, tiny_model

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
triton = pytest.importorskip("triton", reason="the Triton kernels need the package `triton`")

import triton.language as tl  # noqa: E402
from test_ops import FP32, ROUNDED_INSIDE, _bf16, assert_near, randn, run, scan_inputs  # noqa: E402

from hymba.ops import chunked, gpu, reference  # noqa: E402
from hymba.ops.gpu import blocks, cuda, decode, flash, flex, gemv_cuda, scan_cuda, slices, step  # noqa: E402
from hymba.ops.gpu.join import joined  # noqa: E402
from hymba.visibility import EMPTY, KeyValue, stored_positions, visible  # noqa: E402

hopper = flash.hopper

BF16 = ROUNDED_INSIDE if ON_GPU else 2 * ROUNDED_INSIDE
# attention, whose products the interpreter does not know in bfloat16: float16 has three bits more
IN_16_BITS = ROUNDED_INSIDE if ON_GPU else ROUNDED_INSIDE / 8
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


@triton.jit
def _count(x, n):
    for i in range(0, n):
        tl.store(x + i, i)


def _interpreter_works() -> bool:
    x = torch.zeros(3, dtype=torch.int32)
    try:
        _count[(1,)](x, 3)
    except Exception:  # an interpreter that is older than this NumPy
        return False
    return x.tolist() == [0, 1, 2]


pytestmark = pytest.mark.skipif(
    not ON_GPU and not _interpreter_works(), reason="this Triton's interpreter does not run with this NumPy"
)


def on_device(x):
    if isinstance(x, list | tuple):
        return KeyValue(*map(on_device, x)) if isinstance(x, KeyValue) else [on_device(y) for y in x]
    return x.to(DEVICE) if isinstance(x, torch.Tensor) else x


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    """`torch.empty` gives NaN, so that an element that a kernel forgets shows."""
    # PyTorch's own operations need not be deterministic on a GPU
    torch.use_deterministic_algorithms(True, warn_only=ON_GPU)
    yield
    torch.use_deterministic_algorithms(False)


def assert_as_reference(name: str, inputs: list, dtypes=(torch.float32, torch.bfloat16)) -> None:
    for dtype in dtypes:
        given = inputs if dtype == torch.float32 else [_bf16(x) for x in inputs]
        expected = run(getattr(reference, name), given, torch.float32)
        actual = run(getattr(gpu, name), on_device(given))
        for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
            assert_near(a.cpu(), b, FP32 if dtype == torch.float32 else BF16, f"{name} {dtype}, tensor {i}")


@pytest.mark.parametrize(
    ("B", "T", "E", "N", "options"),
    [
        (1, 1, 5, 16, {}),
        (2, 19, 40, 16, {}),
        (3, 13, 33, 8, {"documents": True, "padded": True}),
        (1, 37, 33, 5, {"shared": False, "documents": True}),  # several segments of time
    ],
)
def test_scan(B, T, E, N, options):
    torch.manual_seed(0)
    assert_as_reference("selective_scan", scan_inputs(B, T, E, N, **options))


@pytest.mark.parametrize("dt", [-80.0, -20.0, -7.0, 20.0, 1e4])
def test_scan_at_extremes(dt):
    """Steps that are all tiny have gradients of full precision."""
    torch.manual_seed(0)
    inputs = scan_inputs(1, 9, 17, 4)
    inputs[1] = inputs[1] * 0.01 + dt
    inputs[7] = inputs[7] * 100  # gates at which the exponential overflows
    assert_as_reference("selective_scan", inputs, [torch.float32])


def test_scan_is_repeatable():
    torch.manual_seed(0)
    inputs = on_device(scan_inputs(2, 19, 40, 16))
    for a, b in zip(run(gpu.selective_scan, inputs), run(gpu.selective_scan, inputs), strict=True):
        assert torch.equal(a, b)


@cache
def emulated(file: Path, name: str, macros: tuple) -> ctypes.CDLL:
    """A kernel in CUDA C++ as a function for the CPU."""
    source = "\n".join(
        (
            f'#include "{Path(__file__).with_name("emulate_cuda.h")}"',
            f'#include "{file}"',
            'extern "C" void launch(void** arguments, int blocks, int threads) '
            f"{{ run({name}, arguments, blocks, threads); }}",
        )
    )
    with TemporaryDirectory() as folder:
        library = str(Path(folder) / "kernel.so")
        command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", *(f"-D{k}={v}" for k, v in macros)]
        subprocess.run([*command, "-x", "c++", "-", "-o", library], input=source.encode(), check=True)
        return ctypes.CDLL(library)


@pytest.fixture
def cuda_on_cpu(monkeypatch):
    """Kernels in CUDA C++ without a GPU; for the scan with room for five blocks, which divide what is more."""

    def launch(file, name, macros, blocks, threads, shared, arguments, overlap=False):
        values = [cuda.as_argument(x) for x in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(x) for x in values))
        emulated(file, name, tuple(sorted(macros.items()))).launch(pointers, blocks, threads)

    def fits(u, dt, gate, A, keep):
        return u.dtype == torch.bfloat16 or not keep

    monkeypatch.setattr(cuda, "launch", launch)
    monkeypatch.setattr(scan_cuda, "fits", fits)
    monkeypatch.setattr(gemv_cuda, "fits", lambda *arguments: True)
    monkeypatch.setattr(scan_cuda, "_room", lambda device: 5)


needs_emulator = pytest.mark.skipif(
    ON_GPU or shutil.which("g++") is None, reason="for machines without a GPU, with g++"
)


@needs_emulator
@pytest.mark.parametrize(
    ("B", "T", "E", "options"),
    [
        (1, 1, 16, {}),
        (2, 19, 40, {}),
        (1, 70, 400, {}),  # a chain begun by one block and ended by another; warps with and without channels
        (3, 77, 136, {"documents": True, "padded": True, "shared": False}),
    ],
)
def test_scan_in_cuda(cuda_on_cpu, B, T, E, options):
    torch.manual_seed(0)
    inputs = scan_inputs(B, T, E, 16, **options)
    expected = run(reference.selective_scan, inputs, torch.float32)
    with torch.no_grad():
        for a, b in zip(gpu.selective_scan(*inputs), expected, strict=False):
            assert_near(a, b, FP32, "float32")
    assert_as_reference("selective_scan", inputs, [torch.bfloat16])


@needs_emulator
def test_scan_in_cuda_writes_the_gradient_of_a_slice(cuda_on_cpu, monkeypatch):
    monkeypatch.setattr(slices, "LEAST", 0)
    torch.manual_seed(0)
    *inputs, gate, state = scan_inputs(2, 19, 40, 16)[:9]
    inputs = [_bf16(x) for x in (torch.cat([randn(2, 19, 16), gate], dim=2), *inputs, state)]

    def scan(ops):
        def call(wide, *inputs):
            ((other, gate),) = ops.split(wide.flatten(0, 1), (16, 40), [(2, 19)])
            return other.exp(), *ops.selective_scan(*inputs[:7], gate, inputs[7])

        return call

    for a, b in zip(run(scan(gpu), inputs), run(scan(reference), inputs, torch.float32), strict=True):
        assert_near(a, b, BF16, "scan of a slice")


@pytest.mark.parametrize("documents", [False, True])
def test_conv(documents):
    torch.manual_seed(0)
    starts = torch.rand(2, 21) < 0.3 if documents else None
    for name, rows in (("causal_conv", 1), ("causal_conv", 2), ("branch_conv", 1)):
        assert_as_reference(name, [randn(2, 21, 13), randn(13, 4), randn(13), randn(rows, 3, 13), starts])


@pytest.mark.parametrize(("T", "K"), [(1, 4), (2, 4), (9, 2)])
def test_conv_of_few_steps(T, K):
    torch.manual_seed(0)
    assert_as_reference("causal_conv", [randn(2, T, 9), randn(9, K), randn(9), randn(1, K - 1, 9), None])


@pytest.mark.parametrize("readers", [1, 2])
def test_split(readers, monkeypatch):
    """A convolution and a rotation of the last part write gradients into that of the whole; others are added."""
    monkeypatch.setattr(slices, "LEAST", 0)
    written = []
    monkeypatch.setattr(
        slices._Gradient, "place", lambda self, i, place=slices._Gradient.place: written.append(i) or place(self, i)
    )

    torch.manual_seed(0)
    angles = randn(1, 1, 21, 2).repeat(1, 1, 1, 2)

    def read(x, *conv, ops):
        # some that nobody reads
        (_, before, _, _), (a, b, c, _) = ops.split(x, (5, 8, 12, 3), [(1, 6), (2, 21)])
        cos, sin = angles.cos().to(x.device), angles.sin().to(x.device)
        y = [a.exp(), *ops.branch_conv(b, *conv), *ops.branch_conv(before, *conv)]
        y.append(ops.rotate(ops.heads(c, 3), cos, sin))
        return (*y, b * 2, *ops.branch_conv(b, *conv)) if readers == 2 else tuple(y)

    inputs = [randn(48, 28), randn(8, 4), randn(8), randn(1, 3, 8)]
    expected = run(lambda *x: read(*x, ops=reference), inputs)
    for a, b in zip(run(lambda *x: read(*x, ops=gpu), on_device(inputs)), expected, strict=True):
        assert_near(a.cpu(), b, FP32, "split")
    assert sorted(written) == [1] * readers + [2]


def test_split_holds_the_whole_until_all_gradients_have_come():
    """Kernels on a second stream may read slices when autograd has let go of them."""
    leaf = on_device(randn(6, 5)).requires_grad_()
    whole = leaf * 1
    held, seen = weakref.ref(whole), []
    ((a, b),) = gpu.split(whole, (2, 3), [(2, 3)])
    y = a.exp().sum() + b.sum()
    a.register_hook(lambda gradient: seen.append(held() is not None))
    del whole, a, b
    y.backward()
    assert seen == [True] and held() is None


def test_norms():
    torch.manual_seed(0)
    x, y, v, w = randn(2, 7, 33), randn(2, 7, 33), randn(33), randn(33)
    assert_as_reference("rms_norm", [x, v, 1e-6])
    assert_as_reference("branch_norm", [x, v, 1e-6])
    assert_as_reference("branch_norm", [x, v, 1e-6, y])
    assert_as_reference("mean_of_norms", [[x[:1, :4], y], [y[:1, :4], x], v, w, 1e-6])


@pytest.mark.parametrize("rank", [3, 16, 21])
@pytest.mark.parametrize("projects", [True, False])
def test_selection(rank, projects):
    torch.manual_seed(0)
    N, E = 10, 24
    x = randn(2, 7, 50)[..., : E if projects else rank + 2 * N]
    norms = randn(rank), randn(N), randn(N)
    weight = [0.2 * randn(rank + 2 * N, E)] if projects else []

    def select(ops):
        def call(x, dt_weight, *rest):
            return ops.selection(x, rest[3] if projects else None, dt_weight, rest[:3], 1e-6)

        return call

    for dtype, bound in ((torch.float32, FP32), (torch.bfloat16, 2 * BF16)):  # what is between products is rounded, too
        inputs = [x.to(dtype) for x in (x, 0.2 * randn(E, rank), *norms, *weight)]
        expected = run(select(reference), inputs, torch.float32)
        for a, b in zip(run(select(gpu), on_device(inputs)), expected, strict=True):
            assert_near(a.cpu(), b, bound, f"selection, {dtype}")


@pytest.mark.parametrize("rows", [1, 2])
def test_elementwise(rows):
    """Heads as they come from a projection; angles of all rows or of each."""
    torch.manual_seed(0)
    heads = randn(2, 19, 3, 10).transpose(1, 2)
    angles = randn(rows, 1, 19, 5).repeat(1, 1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    for x, bound in ((heads, FP32), (_bf16(heads), BF16)):
        expected = run(lambda x: reference.rotate(x.float(), cos.to(x.dtype), sin.to(x.dtype)), [x], torch.float32)
        actual = run(lambda x: gpu.rotate(x, on_device(cos), on_device(sin)), [on_device(x)])
        for a, b in zip(actual, expected, strict=True):
            assert_near(a.cpu(), b, bound, f"rotate {x.dtype}")
    assert_as_reference("gated_silu", [randn(2, 7, 33), randn(2, 7, 33)])
    assert_as_reference("gated_linear", [randn(2, 7, 20), randn(33, 20), randn(33, 20)])


@pytest.mark.parametrize("V", [2, 16, 37])
def test_cross_entropy(V):
    """In rows of a wider tensor, whose other columns stay; with a target that does not count and logits of -inf."""
    torch.manual_seed(0)
    wide, targets = 30 * randn(5, V + 3), torch.randint(V, (5,))
    targets[2] = -100
    wide[3, : V - 1] = float("-inf")
    targets[3] = V - 1
    right, ours = wide.clone(), on_device(wide.clone())
    expected = reference.cross_entropy_(right[:, :V], targets, -100)
    actual = gpu.cross_entropy_(ours[:, :V], on_device(targets), -100)
    assert (actual.cpu() - expected).abs().max() < FP32 * 30  # of logits, not of a loss that may be 0
    assert_near(ours.cpu()[torch.isfinite(wide)], right[torch.isfinite(wide)], FP32, "gradients")
    assert torch.equal(ours[:, V:].cpu(), wide[:, V:])


@pytest.mark.parametrize("window", [None, 20])
def test_attention_of_one_query(window):
    """Over meta tokens and a ring that rows have filled to different lengths."""
    torch.manual_seed(0)
    B, G, M, slots = 2, 2, 5, 21
    lengths = torch.tensor([50, 3])
    ring = KeyValue(randn(B, G, slots, 8), randn(B, G, slots, 16), stored_positions(lengths, slots, M))
    meta = KeyValue(randn(1, G, M, 8), randn(1, G, M, 16), torch.arange(M)[None])
    inputs = [randn(B, 6, 1, 8), lengths[:, None] - 1 + M, None, [meta, ring], window, M, 0.3]
    expected = reference.attention(*inputs)
    assert_near(
        decode.decode_attention(*(on_device(x) for i, x in enumerate(inputs) if i != 2)).cpu(), expected, FP32, ""
    )


def queries_and_keys(case: str, T: int = 300, M: int = 20) -> tuple:
    """positions, documents, positions of each source, documents of each"""
    at, row = torch.arange(M + T)[None], torch.arange(T)
    if case == "documents":
        starts = torch.rand(2, T) < 0.02
        starts[:, 0] = True
        documents = starts.cumsum(1)
        positions = M + row - torch.where(starts, row, 0).cummax(1).values
        return positions, documents, (at[:, :M], positions), (None, documents)
    if case == "ring":
        lengths = torch.tensor([350, 90])
        positions = M + lengths[:, None] + row
        return positions, None, (at[:, :M], stored_positions(lengths, 101, M), positions), None
    return at[:, M:], None, (at[:, :M], at[:, M:]), None


@pytest.mark.parametrize("window", [None, 40, 200])
@pytest.mark.parametrize("case", ["text", "documents", "ring"])
def test_blocks_of_attention(case, window):
    """Every visible pair lies in a block that is read, and a block that is read without a mask is visible whole."""
    torch.manual_seed(0)
    positions, documents, where, owners = queries_and_keys(case)
    n_meta = where[0].shape[1]
    mask = flex.block_mask(positions, where, documents, owners, window or blocks.NO_WINDOW, n_meta)
    rows, T, S = mask.shape[0], positions.shape[1], sum(x.shape[1] for x in where)
    see = torch.cat([visible(positions, x, window, n_meta).expand(rows, -1, -1) for x in where], dim=2)
    if documents is not None:
        see[:, :, n_meta:] &= documents[:, :, None] == documents[:, None]
    row, query, key = (torch.arange(n) for n in (rows, T, S))
    allowed = mask.mask_mod(row[:, None, None], 0, query[:, None], key).expand(rows, -1, -1)
    assert torch.equal(allowed, see)
    size = flex.BLOCK
    in_blocks = (
        torch.nn.functional.pad(see, (0, -S % size, 0, -T % size)).unflatten(2, (-1, size)).unflatten(1, (-1, size))
    )
    visible_somewhere, visible_whole = in_blocks.any(-1).any(2), in_blocks.all(-1).all(2)
    masked, full = (
        _chosen(count[:, 0], index[:, 0])
        for count, index in ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices))
    )
    assert not (visible_somewhere & ~(masked | full)).any()
    assert not (full & ~visible_whole).any() and not (masked & full).any()
    if case == "text":
        assert torch.equal(masked | full, visible_somewhere)  # nothing is read for nothing


def attention_inputs(case: str, H: int, G: int, dk: int, dv: int, window: int | None) -> list:
    """q, positions, documents, sources, window, n_meta, scale; queries and keys as they come from a projection"""
    T, M = 75, 5
    positions, documents, where, owners = queries_and_keys(case, T, M)
    rows, owners = 2, owners or [None] * len(where)
    sources = [
        KeyValue(*(randn(1 if i == 0 else rows, x.shape[1], G, d).transpose(1, 2) for d in (dk, dv)), x, owner)
        for i, (x, owner) in enumerate(zip(where, owners, strict=True))
    ]
    return [randn(rows, T, H, dk).transpose(1, 2), positions, documents, sources, window, M, 0.3]


def in_16_bits(inputs):
    if isinstance(inputs, list | tuple):
        return KeyValue(*map(in_16_bits, inputs)) if isinstance(inputs, KeyValue) else [in_16_bits(x) for x in inputs]
    floating = isinstance(inputs, torch.Tensor) and inputs.is_floating_point()
    return inputs.to(torch.bfloat16 if ON_GPU else torch.float16) if floating else inputs


@pytest.mark.parametrize(
    ("case", "H", "G", "dk", "dv", "window"),
    [
        ("text", 4, 2, 16, 32, None),
        ("text", 5, 1, 64, 128, 20),
        ("text", 2, 2, 6, 12, 200),
        ("documents", 3, 1, 24, 48, 20),
        ("documents", 2, 1, 16, 16, None),
        ("ring", 4, 2, 16, 32, 20),  # of which a part is empty
    ],
)
def test_attention_with_gradients(case, H, G, dk, dv, window, monkeypatch):
    for other in (flex, chunked):
        monkeypatch.setattr(other, "attention", None)
    torch.manual_seed(0)
    inputs = in_16_bits(attention_inputs(case, H, G, dk, dv, window))
    expected = run(reference.attention, inputs, torch.float32)
    actual = run(gpu.attention, on_device(inputs))
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert_near(a.cpu().float(), b, IN_16_BITS, f"{case}, tensor {i}")


def test_attention_is_repeatable():
    torch.manual_seed(0)
    inputs = on_device(in_16_bits(attention_inputs("text", 4, 2, 16, 32, 20)))
    for a, b in zip(run(gpu.attention, inputs), run(gpu.attention, inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("T", [2, 33])
def test_attention_of_one_source(T):
    """The meta tokens: one row that sees itself."""
    torch.manual_seed(0)
    q, k, v = (randn(1, T, heads, d).transpose(1, 2) for heads, d in ((4, 16), (2, 16), (2, 32)))
    at = torch.arange(T)[None]
    inputs = in_16_bits([q, at, None, [KeyValue(k, v, at)], 7, 3, 0.3])
    expected = run(reference.attention, inputs, torch.float32)
    for a, b in zip(run(gpu.attention, on_device(inputs)), expected, strict=True):
        assert_near(a.cpu().float(), b, IN_16_BITS, "")


def test_attention_of_queries_that_see_nothing():
    """Their output is 0, and so are the gradients that they cause."""
    torch.manual_seed(0)
    q, positions, documents, (_, source), *rest = in_16_bits(attention_inputs("text", 2, 1, 16, 32, 20))
    positions = positions.clone()
    positions[:, :40] = 0  # before all keys
    y, dq, *others = run(gpu.attention, on_device([q, positions, documents, [source], *rest]))
    assert not y[:, :40].any() and not dq[:, :, :40].any()
    assert all(x.isfinite().all() for x in (y, dq, *others)) and y[:, 40:].any()


@pytest.mark.skipif(hopper is None, reason="an older Triton")
@pytest.mark.parametrize("window", [None, 90])
def test_attention_on_hopper(window, monkeypatch):
    """Each row with positions of its own, keys in places that hold none, queries that see nothing"""
    if not ON_GPU:
        from emulate_gluon import emulate  # which needs Gluon, as `hopper` does

        emulate(monkeypatch, processors=3)
        monkeypatch.setattr(hopper, "supports", lambda *inputs: True)
    elif torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("no Hopper card")
    monkeypatch.setattr(hopper, "_processors", lambda device: 3)
    torch.manual_seed(0)
    B, T, H, G, M = 2, 256, 4, 2, 128
    at = torch.arange(M + T) + torch.tensor([[0], [5]])
    positions, places = at[:, M:], at.clone()
    places[1, :192] = EMPTY
    inputs = [randn(B, n, heads, d).bfloat16() for n, heads, d in ((T, H, 64), (M + T, G, 64), (M + T, G, 128))]
    dy = randn(B, T, H * 128).bfloat16() * visible(positions, places, window, M).any(-1, keepdim=True)

    def run(attention, device, dtype):
        q, k, v = (x.to(device, dtype).requires_grad_() for x in inputs)
        source = KeyValue(k.transpose(1, 2), v.transpose(1, 2), places.to(device))
        y = attention(q.transpose(1, 2), positions.to(device), None, [source], window, M, 0.125)
        return [x.cpu().float() for x in (y, *torch.autograd.grad(y, (q, k, v), dy.to(device, dtype)))]

    y, *gradients = run(flash.attention, DEVICE, torch.bfloat16)
    expected, *others = run(reference.attention, "cpu", torch.float32)
    blind = ~visible(positions, places, window, M).any(-1)
    assert blind.any() and not y[blind].any()
    for a, b in zip((y[~blind], *gradients), (expected[~blind], *others), strict=True):
        assert_near(a, b, ROUNDED_INSIDE, "")


@pytest.mark.parametrize("window", [blocks.NO_WINDOW, 40, 200])
@pytest.mark.parametrize("case", ["text", "documents", "ring"])
def test_lists_of_blocks(case, window):
    torch.manual_seed(0)
    positions, documents, where, owners = on_device(queries_and_keys(case))
    mask = flash.make_mask(positions, tuple(where), documents, owners and tuple(owners), window, 20, True)
    of_forward, of_queries, of_keys = flash.plan(DEVICE)
    for tiles, lists in ((of_forward, mask.forward), (of_queries, mask.queries), (of_keys, mask.keys)):
        some, full = blocks.touched(mask.at, window, 20, tiles.queries, tiles.keys)
        expected = torch.stack((some & ~full, full), dim=2 if lists is not mask.keys else 1)
        if lists is mask.keys:
            expected = expected.permute(0, 3, 1, 2)
        assert torch.equal(lists[..., 0], expected.sum(-1).int())
        for listed, chosen in zip(lists.flatten(0, 2), expected.flatten(0, 2), strict=True):
            assert listed[1 : 1 + listed[0]].tolist() == chosen.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("dk", [6, 16])
def test_attention_of_narrow_heads(dk, monkeypatch):
    """The compiled kernel takes no heads below 16, so they are padded."""
    if not ON_GPU:  # the compiler has no kernel for what is to be differentiated on a CPU
        monkeypatch.setattr(flex, "_compiled", lambda dynamic: flex._joined_heads)
    torch.manual_seed(0)
    B, G, T, M, at = 2, 2, 40, 5, torch.arange(45)[None]
    sources = [
        KeyValue(randn(1, G, M, dk), randn(1, G, M, 2 * dk), at[:, :M]),
        KeyValue(randn(B, G, T, dk), randn(B, G, T, 2 * dk), at[:, M:]),
    ]
    inputs = [randn(B, 4, T, dk), at[:, M:], None, sources, 20, M, 0.3]
    actual = flex.attention(*(on_device(x) for x in inputs))
    assert_near(actual.cpu(), reference.attention(*inputs), FP32, "y")


@pytest.mark.parametrize("rows", [1, 2])
def test_joined_keys(rows):
    """Keys as they come from a projection; meta tokens' are one row's, or each row has its own."""
    torch.manual_seed(0)
    B, G, M, T = 2, 3, 5, 19
    text = [randn(B, T, G, d).transpose(1, 2) for d in (6, 12)]
    at = torch.arange(M + T)[None]

    def join(meta_k, meta_v, k, v):
        return joined([KeyValue(meta_k, meta_v, at[:, :M]), KeyValue(k, v, at[:, M:])], B, k.dtype)

    def expected(*inputs):
        return tuple(torch.cat([x.expand(B, -1, -1, -1), y], 2) for x, y in zip(inputs[:2], inputs[2:], strict=True))

    inputs = [randn(rows, G, M, 6), randn(rows, G, M, 12), *text]
    for a, b in zip(run(join, on_device(inputs)), run(expected, inputs), strict=True):
        assert_near(a.cpu(), b, FP32, "joined")


def _chosen(count, index):
    """count: (rows, n), index: (rows, n, m) -> (rows, n, m), whether a block is among the first `count`"""
    listed = torch.arange(index.shape[2]) < count[..., None]
    return torch.zeros(index.shape, dtype=torch.bool).scatter(2, index.long(), listed)


def assert_gemv(rows: int, K: int, dtype: torch.dtype, tolerance: float) -> None:
    """A matrix-vector product in all its forms, with what stands before and after it folded in."""
    torch.manual_seed(0)
    sizes = (K,), (K,), (rows, K), (rows, K), (K,), (K,), (rows,)
    x, _, w, up, v, _, residual = given = [randn(*size).to(dtype) for size in sizes]
    a, b, W, V, n, n2, r = (z.float() for z in given)

    def check(form, expected, x=x, out=dtype, **options):
        y = torch.full((rows,), float("nan"), dtype=out, device=DEVICE)
        step.gemv(on_device(x), on_device(w), y, **{key: on_device(value) for key, value in options.items()})
        assert_near(y.cpu(), expected, tolerance, form)

    normed = reference.rms_norm(a, n, 1e-6)
    check("plain", W @ a)
    check("norm", W @ normed, norm=v, eps=1e-6, out=torch.float32)
    check("residual", W @ a + r, residual=residual)
    check("gated", torch.nn.functional.silu(W @ normed) * (V @ normed), norm=v, eps=1e-6, up=up)
    check("squared ReLU", torch.relu(W @ normed).square(), norm=v, eps=1e-6, squared_relu=True)
    squares = torch.cat([a.square().view(2, -1).sum(1), torch.zeros(1), b.square().sum()[None]])
    other = (b * n2).to(dtype), squares, 2
    mean = W @ reference.mean_of_norms([a[None, None]], [b[None, None]], n, n2, 1e-6)[0] + r
    check("mean", mean, (a * n).to(dtype), eps=1e-6, mean_with=other, residual=residual)


@pytest.mark.parametrize(("rows", "K"), [(7, 38), (130, 40)])
def test_gemv(rows, K):
    """Rows that are no whole pieces of 16 bytes, and rows that are."""
    assert_gemv(rows, K, torch.float32, FP32)
    assert_gemv(rows, K, torch.bfloat16, BF16)


@needs_emulator
@pytest.mark.parametrize(
    ("rows", "K", "dtype", "tolerance"),
    [
        (37, 44, torch.float32, FP32),  # 8 rows a block, 4 of each of two matrices; threads without a piece
        (5, 3032, torch.bfloat16, BF16),  # 4 rows and 2; most threads have three pieces, some two
    ],
)
def test_gemv_in_cuda(cuda_on_cpu, rows, K, dtype, tolerance):
    assert_gemv(rows, K, dtype, tolerance)


def test_beginning_of_a_step():
    """Rows of different lengths, a ring that has gone round and a span."""
    torch.manual_seed(0)
    ids, lengths, embedding, n_meta = torch.tensor([3, 0, 9]), torch.tensor([50, 0, 20]), randn(10, 38), 5
    positions = [torch.full((3, slots), -7, dtype=torch.int32, device=DEVICE) for slots in (21, 64)]
    counted = on_device(lengths.int())
    tokens, now = torch.empty_like(counted), torch.empty(3, 1, dtype=torch.int32, device=DEVICE)
    x = step.begin(on_device(ids), on_device(embedding), counted, tokens, now, positions, n_meta)
    assert torch.equal(x.cpu(), embedding[ids])
    assert torch.equal(tokens.cpu(), lengths.int()) and torch.equal(counted.cpu(), lengths.int() + 1)
    assert torch.equal(now.cpu(), lengths.int()[:, None] + n_meta)
    for at in positions:
        assert torch.equal(at.cpu(), stored_positions(lengths + 1, at.shape[1], n_meta).int())


@pytest.mark.parametrize("case", ["keys of its own", "another layer's keys", "no meta tokens", "norms of heads"])
def test_branches_of_one_row(case):
    """Attention beside the recurrence's step, from what the input projection leaves; a ring that goes round."""
    torch.manual_seed(0)
    E, N, rank, H, G, M, slots, window, eps, dk, K = 40, 4, 6, 6, 2, 5, 21, 20, 1e-6, 16, 4
    M, makes = 0 if case == "no meta tokens" else M, case != "another layer's keys"
    token = 49  # number of the new one
    ring = KeyValue(
        randn(1, G, slots, dk), randn(1, G, slots, 2 * dk), stored_positions(torch.tensor([token]), slots, M)
    )
    sources = [KeyValue(randn(1, G, M, dk), randn(1, G, M, 2 * dk), torch.arange(M)[None])] if M else []
    own = (G * dk, 2 * G * dk) if makes else ()
    proj = randn(1, H * dk + sum(own) + 2 * E)
    q, *kv, u, gate = proj.split((H * dk, *own, E, E), dim=1)
    angles = randn(token + 1, dk // 2)
    cos, sin = (torch.cat([x, x], dim=1)[-1].view(1, 1, 1, dk) for x in (angles.cos(), angles.sin()))
    norms = [randn(H, dk), randn(G, dk)] if case == "norms of heads" else [None, None]

    def rotated(x, heads, norm):
        x = x.view(1, heads, 1, dk)
        return reference.rotate(x if norm is None else reference.rms_norm(x, norm[:, None], 1e-6), cos, sin)

    slot, after = token % slots, stored_positions(torch.tensor([token + 1]), slots, M)
    k, v = ring.k.clone(), ring.v.clone()
    if makes:
        k[:, :, slot], v[:, :, slot] = rotated(kv[0], G, norms[1])[:, :, 0], kv[1].view(1, G, 2 * dk)
    at = torch.tensor([[token + M]])
    expected = reference.attention(
        rotated(q, H, norms[0]), at, None, [*sources, KeyValue(k, v, after)], window, M, 0.25
    )
    x_proj, dt_norm, dt_weight, dt_bias, A, B_norm, C_norm, D = weights = [
        randn(rank + 2 * N, E) / E**0.5, randn(rank), randn(E, rank), randn(E), -randn(E, N).exp(), randn(N), randn(N),
        randn(E),
    ]  # fmt: skip
    conv = randn(E, K), randn(E), randn(1, K - 1, E)
    state = randn(1, E, N)
    mixed = reference.causal_conv(u[:, None], *conv)
    low = (mixed @ x_proj.T).split((rank, N, N), dim=-1)
    dt, B, C = (reference.rms_norm(x, w, eps) for x, w in zip(low, (dt_norm, B_norm, C_norm), strict=True))
    expected_y, expected_state = reference.selective_scan(
        mixed, dt @ dt_weight.T, dt_bias, A, B, C, D, gate[:, None], state
    )
    branch_norms = randn(H * 2 * dk), randn(E)
    store = on_device(ring._replace(positions=after))
    conv_state, ssm_state = on_device([conv[2].clone(), state])
    attn, y, squares = (
        x.cpu() for x in step.branches(
            *on_device([proj, torch.tensor([token], dtype=torch.int32), angles.cos(), angles.sin(), *norms, 1e-6]),
            makes, H, on_device(at), [*on_device(sources), store], window, M, 0.25, *on_device(conv[:2]), conv_state,
            *on_device(weights), ssm_state, eps, *on_device(branch_norms),
        )
    )  # fmt: skip
    assert_near(attn, expected[:, 0] * branch_norms[0], FP32, "attention")
    assert_near(y, expected_y[:, 0] * branch_norms[1], FP32, "y")
    sums = torch.stack([expected.square().sum(), expected_y.square().sum()])
    assert_near(torch.stack([squares[:H].sum(), squares[H:].sum()]), sums, FP32, "sums of squares")
    assert_near(ssm_state.cpu(), expected_state, FP32, "state")
    assert_near(conv_state.cpu(), torch.cat([conv[2][:, 1:], u[:, None]], dim=1), FP32, "conv state")
    for name, stored, right in (("keys", store.k, k), ("values", store.v, v)):
        assert_near(stored.cpu(), right, FP32, name)


@pytest.mark.parametrize("changes", [{}, {"qk_norm": "perhead-rms", "mlp_activation": "relu2"}])
def test_a_decoding_step_is_the_model(changes, monkeypatch):
    """What the graph decoder captures for a batch of one, as it is; the window is crossed."""
    from hymba import ops
    from hymba.engine import cuda

    monkeypatch.setattr(cuda, "supports", lambda model: None)
    model = tiny_model(**changes).to(DEVICE)
    before = model.config.window + 1
    ids = random_ids(1, before + 2).to(DEVICE)
    with torch.inference_mode(), ops.use_backend("reference"):
        expected = model(ids)
        cache = model.new_cache(1, 64)
        model(ids[:, :before], cache=cache)
    graph = object.__new__(cuda._Graph)
    graph._allocate(cuda.GraphDecoder(model, 1), cache)
    for t in range(before, ids.shape[1]):
        graph.ids.copy_(ids[:, t])
        with torch.inference_mode():
            logits = graph._step()
        assert_near(logits.cpu(), expected[:, t].cpu(), 1e-5, f"token {t}")
    assert graph.lengths.item() == ids.shape[1]


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")
def test_training_step_as_plain_pytorch(monkeypatch):
    from hymba import ops

    monkeypatch.setattr(gpu, "FEW", 0)
    model = tiny_model().to(DEVICE)
    ids = random_ids(2, 150).to(DEVICE)
    documents = (torch.rand(2, 150, device=DEVICE) < 0.05).cumsum(1)
    results = []
    for backend in ("gpu", "torch"):
        model.zero_grad()
        with ops.use_backend(backend):
            loss = model(ids, document_ids=documents, labels=ids)
            loss.backward()
        results.append([loss, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*results, strict=True):
        assert_near(a, b, 1e-4, "training step")  # float32 through all layers


@pytest.mark.slow
def test_recomputed_blocks_have_the_same_gradients(monkeypatch):
    """A block that is computed again in the backward pass gives each saved tensor once only."""
    from hymba import ops

    monkeypatch.setitem(ops.BACKENDS, "gpu", gpu)
    torch.manual_seed(0)
    model, ids = tiny_model().to(DEVICE), random_ids(1, 4).to(DEVICE)
    results = []
    for model.checkpoint_blocks in (False, True):
        model.zero_grad()
        with ops.use_backend("gpu"):
            model(ids, labels=ids).backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*results, strict=True):
        assert_near(b, a, FP32, "gradient")


@pytest.mark.parametrize("frozen", [(0,), (1,), (1, 2), (0, 2)])
def test_frozen_inputs_of_a_gated_mlp_get_no_gradient(frozen):
    torch.manual_seed(0)
    inputs = on_device([randn(2, 7, 20), randn(33, 20), randn(33, 20)])
    results = []
    for backend in (gpu, reference):
        leaves = [x.clone().requires_grad_(i not in frozen) for i, x in enumerate(inputs)]
        backend.gated_linear(*leaves).sum().backward()
        results.append([x.grad for x in leaves])
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        assert (a is None) == (b is None) == (i in frozen)
        if a is not None:
            assert_near(a, b, FP32, "gradient")
