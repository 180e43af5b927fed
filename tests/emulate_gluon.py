"""Kernels of `ops.gpu.hopper` on a CPU: Triton's interpreter does not know Gluon.

Every partition of every program is a thread. Barriers count arrivals and bytes as the card's do, so a wait that nothing
ends is an error here, not a card that hangs. Products are done as late as they may be, when they are waited for: a
place in shared memory that is given away too early shows in the numbers.
"""

import threading
from types import SimpleNamespace

import torch

from hymba.ops.gpu import hopper

PATIENCE = 60.0  # seconds until a wait counts as endless
local = threading.local()  # program, and products begun in this partition
changed = threading.Condition()
failed: list[BaseException] = []


class Number(int):
    """A constant of kernels, which the host reads, too"""

    value = property(int)


class Barrier:
    def __init__(self):
        self.phases = 0

    def index(self, i):
        return self.parts[int(i)]

    @property
    def shape(self):
        return [len(self.parts), 1]

    def step(self, arrivals, missing):
        with changed:
            self.arrivals -= arrivals
            self.missing += missing
            if self.arrivals == 0 and self.missing == 0:
                self.arrivals = self.count
                self.phases += 1
            changed.notify_all()


class Place:
    """A part of shared memory"""

    def __init__(self, x):
        self.x, self.shape, self.dtype = x, list(x.shape), x.dtype

    def index(self, i):
        return Place(self.x[int(i)])

    def slice(self, start, length):
        return Place(self.x[start : start + length])

    def permute(self, order):
        return Place(self.x.permute(order))

    def load(self, layout):
        return self.x.clone()

    def store(self, x):
        self.x.copy_(x)


class Pointer:
    def __init__(self, x, at=0):
        self.x, self.at = x, at

    def __add__(self, at):
        return Pointer(self.x, self.at + at)


class Described:
    def __init__(self, x, *block):
        self.x, self.block_type, self.dtype, self.layout = x, SimpleNamespace(shape=list(block)), x.dtype, None

    def part(self, at):
        """What of the block lies inside, and where in the block"""
        here = tuple(slice(int(i), int(i) + n) for i, n in zip(at, self.block_type.shape, strict=True))
        inside = self.x[here]
        return inside, tuple(slice(0, n) for n in inside.shape)


class Product:
    def __init__(self, a, b, acc, use_acc):
        self.terms, self.done = (a, b, acc, use_acc), None

    def finish(self):
        a, b, acc, use_acc = (x.done if isinstance(x, Product) else x for x in self.terms)
        a, b = (x.x if isinstance(x, Place) else x for x in (a, b))
        self.done = a.float() @ b.float() + (acc if use_acc else 0)


def product(a, b, acc, *, use_acc=True, is_async):
    assert is_async
    local.begun.append(Product(a, b, acc, use_acc))
    return local.begun[-1]


def wait_for_products(pending, deps):
    while len(local.begun) > pending:
        local.begun.pop(0).finish()
    results = [x.done if isinstance(x, Product) else x for x in deps]
    assert all(x is not None for x in results), "a product is used that was not waited for"
    return results[0] if len(results) == 1 else tuple(results)


def wait(barrier, phase):
    with changed:
        if not changed.wait_for(lambda: failed or barrier.phases % 2 != int(phase), PATIENCE):
            raise TimeoutError("a barrier that nobody ends")
        if failed:
            raise RuntimeError("another partition failed")


def init(barrier, count):
    barrier.count = barrier.arrivals = count
    barrier.missing = 0


def arrive(barrier, pred=True):
    if pred:
        barrier.step(1, 0)


def fetch(description, at, barrier, place):
    inside, where = description.part(at)
    place.x.zero_()
    place.x[where] = inside
    barrier.step(0, -place.x.numel() * place.x.element_size())


def send(description, at, place):
    inside, where = description.part(at)
    inside.copy_(place.x[where])


def shared(dtype, shape, layout):
    if dtype != torch.int64:
        kind = torch.float32 if dtype.is_floating_point else dtype
        return Place(torch.full(shape, float("nan") if dtype.is_floating_point else -7, dtype=kind).to(dtype))
    bars = Barrier()
    bars.parts = [Barrier() for _ in range(shape[0])]
    return bars


def load(pointer):
    return pointer.x.reshape(-1)[pointer.at].clone()


def store(pointer, x):
    pointer.x.view(-1)[pointer.at] = x


def atomic_add(pointer, x):
    with changed:
        before = load(pointer)
        store(pointer, before + x)
        return before


def numbers(*bounds):
    return (torch.tensor(i) for i in range(*(int(x) for x in bounds)))


def both(f):
    return lambda a, b: f(*(x if isinstance(x, torch.Tensor) else torch.tensor(x) for x in (a, b)))


def see(q_at, k_at, window, n_meta):
    return (k_at <= q_at) & ((q_at - k_at <= window) | (k_at < n_meta))


def specialize(partitions, warps, registers):
    program = local.program

    def run(f, arguments):
        local.program, local.begun = program, []
        try:
            with torch.no_grad():  # which a thread does not inherit
                f(*arguments)
        except BaseException as error:
            with changed:
                failed.append(error)
                changed.notify_all()

    together([(run, x) for x in partitions])


def together(calls):
    threads = [threading.Thread(target=f, args=arguments) for f, arguments in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Kernel:
    def __init__(self, f):
        self.f = f

    def __getitem__(self, grid):
        def launch(*arguments, num_warps, **constants):
            def one(i):
                local.program = torch.tensor(i), torch.tensor(grid[0])
                self.f(*(wrap(x) for x in arguments), **constants)

            def wrap(x):
                if isinstance(x, torch.Tensor):
                    return Pointer(x)
                return torch.tensor(x) if isinstance(x, int) else x

            failed.clear()
            together([(one, (i,)) for i in range(grid[0])])
            if failed:
                raise failed[0]

        return launch


def emulate(monkeypatch, processors):
    """Let `hopper` run here, on so many multiprocessors."""
    layout = lambda *x: None  # noqa: E731
    gl = SimpleNamespace(
        **{name: getattr(torch, name) for name in ("float32", "bfloat16", "int32", "int64", "where", "exp2", "log2")},
        constexpr=object, static_range=range, load=load, store=store, atomic_add=atomic_add,
        allocate_shared_memory=shared, warp_specialize=specialize,
        NVMMADistributedLayout=layout, DotOperandLayout=layout, SliceLayout=layout, BlockedLayout=layout,
        SwizzledSharedLayout=layout, convert_layout=lambda x, layout: x,
        arange=lambda a, b, layout: torch.arange(a, b),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        full=lambda shape, x, dtype, layout: torch.full(shape, int(x) if dtype == torch.int32 else x, dtype=dtype),
        maximum=both(torch.maximum), minimum=both(torch.minimum), expand_dims=torch.unsqueeze,
        max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis),
        program_id=lambda axis: local.program[0], num_programs=lambda axis: local.program[1],
    )  # fmt: skip
    names = {
        "gl": gl, "range": numbers, "warpgroup_mma": product, "warpgroup_mma_wait": wait_for_products, "_see": see,
        "mbarrier": SimpleNamespace(
            init=init, wait=wait, arrive=arrive, expect=lambda barrier, n: barrier.step(1, n), MBarrierLayout=layout
        ),
        "tma": SimpleNamespace(
            async_copy_global_to_shared=fetch, async_copy_shared_to_global=send, store_wait=lambda pending: None
        ),
        "fence_async_shared": lambda: None, "_described": Described, "_processors": lambda device: processors,
        "HALF": Number(hopper.HALF.value), "LOG2E": hopper.LOG2E.value,
    }  # fmt: skip
    for name, x in list(vars(hopper).items()):
        if isinstance(x, hopper.gluon.jit(see).__class__):
            names.setdefault(name, Kernel(x.fn) if name.endswith("_kernel") else x.fn)
    for name, x in names.items():
        monkeypatch.setattr(hopper, name, x, raising=False)
