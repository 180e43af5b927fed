"""The model as a PyTorch module: gradients, recomputation, compilation, memory of the loss, dtypes, and mistakes."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    TINY,
    VARIANTS,
    WINDOW,
    assert_close,
    assert_same_gradients,
    each_variant,
    gradients,
    random_ids,
    tiny_model,
)  # fmt: skip
from torch.utils._python_dispatch import TorchDispatchMode

import hymba.model.loss as loss_module
from hymba import Hymba, UserError

LENGTH = 2 * WINDOW + 3
SMALL = {"n_layers": 2, "global_layers": (0,), "kv_groups": (), "n_meta": 2, "window": 3}


# ------------------------------------------------------------------------------------------------------- what it means


@torch.no_grad()
def test_meta_tokens_are_tokens_in_front_of_the_text():
    """Where all is visible, meta tokens do what text with the same embeddings does: read once, they lose nothing."""
    model = tiny_model(window=None, global_layers=())
    M, V = TINY.n_meta, TINY.vocab_size
    plain = Hymba(replace(model.config, n_meta=0, vocab_size=V + M)).eval()
    weights = {name: x for name, x in model.state_dict().items() if name != "lm_head.weight"}
    weights["meta_tokens"] = plain.meta_tokens
    weights["embedding.weight"] = torch.cat([weights["embedding.weight"], model.meta_tokens])
    plain.load_state_dict(weights | {"lm_head.weight": weights["embedding.weight"]})
    ids = random_ids(2, LENGTH)
    in_front = torch.cat([torch.arange(V, V + M).expand(2, M), ids], dim=1)
    assert_close(model(ids), plain(in_front)[:, M:, :V])


@each_variant
@torch.no_grad()
def test_no_token_sees_a_later_one(changes):
    model, ids = tiny_model(**changes), random_ids(1, LENGTH)
    if changes.get("rope") == "dynamic_ntk":  # sees the length of the text, not the tokens
        shorter = ids.clone()
        shorter[:, WINDOW:] = random_ids(1, LENGTH - WINDOW, seed=1)
    else:
        shorter = ids[:, :WINDOW]
    assert_close(model(shorter)[:, :WINDOW], model(ids)[:, :WINDOW])


@torch.no_grad()
def test_a_local_head_sees_itself_the_window_and_the_meta_tokens():
    """Attention of one local layer: a token counts for the next `window` tokens, and then no more."""
    model = tiny_model(n_layers=1, global_layers=(), kv_groups=())
    attention = []
    model.blocks[0].heads.attention.register_forward_hook(lambda module, arguments, output: attention.append(output))
    ids = random_ids(1, LENGTH)
    model(ids)
    ids[0, 2] = (ids[0, 2] + 1) % TINY.vocab_size
    model(ids)
    _, first, _, second = attention  # meta tokens, text, twice
    changed = (first != second).any(-1)[0].nonzero().flatten().tolist()
    assert changed == list(range(2, 2 + WINDOW + 1))
    model.meta_tokens += 1
    model(ids)
    assert (attention[-1] != second).any(-1).all()


# ----------------------------------------------------------------------------------------------------------- gradients


def unused(model: Hymba) -> set[str]:
    """Parameters that the released layout has and nobody reads: key norms of layers that make no keys."""
    consumers = [plan.index for plan in model.config.layers if not plan.produces_kv]
    return {f"blocks.{i}.heads.attention.k_norm.weight" for i in consumers if model.config.qk_norm != "none"} | (
        {"meta_tokens"} if model.config.n_meta == 0 else set()
    )


@each_variant
def test_gradients_reach_every_parameter(changes):
    """Every element of every parameter, but embeddings of ids that do not occur and, untied, that of the padding id."""
    model, ids = tiny_model(**changes), random_ids(2, LENGTH)
    ids[:, 3] = model.config.pad_token_id
    model(ids, labels=ids).backward()
    found = gradients(model)
    assert {name for name, _ in model.named_parameters()} - found.keys() <= unused(model)
    for name, gradient in found.items():
        assert gradient.isfinite().all(), name
        if name in unused(model):
            continue
        reached = gradient != 0
        if name == "embedding.weight" and not model.config.tie_embeddings:
            occurs = torch.zeros(TINY.vocab_size, dtype=torch.bool)
            occurs[ids[:, :-1].flatten()] = True
            occurs[model.config.pad_token_id] = False
            assert torch.equal(reached.any(1), occurs)
        elif "up_proj" in name or "down_proj" in name:
            assert reached.any(), name  # squared ReLU has units that are never on
        else:
            assert reached.all(), name


def test_gradients_are_derivatives():
    """Along a random direction in each parameter the loss changes as the gradient says."""
    model, ids = tiny_model(), random_ids(2, LENGTH).clamp(min=1)  # the padding id's embedding is an exception, below
    generator = torch.Generator().manual_seed(1)
    model(ids, labels=ids).backward()
    found = gradients(model)
    step = 1e-2
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator)
        direction *= step / direction.norm()
        values = []
        with torch.no_grad():
            for sign in (1, -2, 1):
                parameter += sign * direction
                values.append(model(ids, labels=ids).double())
        slope = (values[0] - values[1]) / 2
        # a float32 loss of about 20 is known to 2e-6, and the step has some curvature
        assert abs(slope - (found[name] * direction).sum()) < 1e-5 + 1e-2 * abs(slope), name


def test_the_padding_id_is_not_learned_from_the_input():
    """As in the released model. The tied output side teaches it as any other id."""
    ids, labels = random_ids(1, LENGTH).clamp(min=1), random_ids(1, LENGTH, seed=1)
    for tied in (True, False):
        found = []
        for first in (TINY.pad_token_id, 5):
            ids[:, 0] = first
            model = tiny_model(tie_embeddings=tied)
            model(ids, labels=labels).backward()
            found.append(gradients(model)["embedding.weight"])
        assert found[0][TINY.pad_token_id].any() == tied
        assert (found[1][5] != 0).all()


@pytest.mark.parametrize("name", ["tiny", "samba", "mamba2"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed and padded"])
def test_recomputed_activations_change_nothing(packed, name):
    model, ids = tiny_model(**VARIANTS[name]), random_ids(2, LENGTH)
    extra = {}
    if packed:
        mask = torch.ones_like(ids)
        mask[0, -3:] = 0
        extra = {"document_ids": (torch.arange(LENGTH) // 7).expand(2, -1), "attention_mask": mask}
    losses, grads = [], []
    for model.checkpoint_blocks in (False, True):
        losses.append(model(ids, labels=ids, **extra))
        losses[-1].backward()
        grads.append(gradients(model))
    assert torch.equal(*losses)
    assert_same_gradients(grads[1], grads[0], 1e-6)


def test_recomputation_keeps_less():
    """Bytes that autograd keeps for the backward pass."""
    model, ids = tiny_model(), random_ids(2, LENGTH)
    kept = []
    for model.checkpoint_blocks in (False, True):
        seen = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, seen=seen: seen.setdefault(x.data_ptr(), x), lambda x: x
        ):
            model.hidden(ids)
        kept.append(sum(x.untyped_storage().nbytes() for x in seen.values()))
    assert kept[1] < kept[0] / 3


# ------------------------------------------------------------------------------------------------------------ compiled


def assert_compiles(backend: str, extra: dict, **changes) -> None:
    model, ids = tiny_model(**SMALL | changes), random_ids(2, 5)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    expected = model(ids, labels=ids, **extra)
    expected.backward()
    plain = gradients(model)
    with torch.no_grad():
        assert_close(compiled(ids, **extra), model(ids, **extra))
    loss = compiled(ids, labels=ids, **extra)
    loss.backward()
    assert_close(loss, expected)
    assert_same_gradients(gradients(model), plain)


MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
DOCUMENTS = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])


@pytest.mark.parametrize("extra", [{}, {"attention_mask": MASK, "document_ids": DOCUMENTS}], ids=["plain", "packed"])
def test_compiles_without_graph_breaks(extra):
    assert_compiles("aot_eager", extra)


@pytest.mark.parametrize("name", ["mamba2 and attention", "concat"])
def test_other_architectures_compile(name):
    changes = {"n_layers": 2, "mixers": ("mamba2", "attention")} if "mamba2" in name else {}
    sizes = {"global_layers": (), "kv_groups": (), "n_layers": 2, "n_meta": 2, "window": 3}
    extra = {"attention_mask": MASK, "document_ids": DOCUMENTS}
    assert_compiles("aot_eager", extra, **VARIANTS[name] | sizes | changes)


@pytest.mark.slow
def test_compiles_to_kernels():
    assert_compiles("inductor", {"attention_mask": MASK, "document_ids": DOCUMENTS}, n_layers=1)


# ---------------------------------------------------------------------------------------------------------------- loss


def test_the_loss_is_the_cross_entropy_of_the_logits(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK", 7)  # several chunks, the last one not full
    model, ids = tiny_model(), random_ids(3, LENGTH)
    labels = ids.clone()
    labels[1, :9] = -100
    expected = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected.backward()
    plain = gradients(model)
    loss = model(ids, labels=labels)
    loss.backward()
    assert_close(loss, expected)
    assert_same_gradients(gradients(model), plain)
    assert loss.dtype == torch.float32


def test_the_loss_of_nothing_is_zero():
    model, ids = tiny_model(), random_ids(1, 5)
    assert model(ids, labels=torch.full_like(ids, -100)) == 0
    assert model(ids[:, :1], labels=ids[:, :1]) == 0


class LargestLogits(TorchDispatchMode):
    """The most rows of a tensor as wide as the vocabulary that any operation gives, by dtype."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size, self.rows = vocab_size, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for x in output if isinstance(output, tuple | list) else (output,):
            if isinstance(x, torch.Tensor) and x.dim() and x.shape[-1] == self.vocab_size:
                self.rows[x.dtype] = max(self.rows.get(x.dtype, 0), x.numel() // self.vocab_size)
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_of_a_long_text_are_never_held_at_once(monkeypatch, dtype):
    """Neither in the forward nor in the backward pass, and nothing of them is kept in between."""
    chunk, V = 40, 999  # more than the rows of the head's weight, transposed
    monkeypatch.setattr(loss_module, "CHUNK", chunk)
    model, ids = tiny_model(vocab_size=V).to(dtype), random_ids(4, LENGTH, vocab_size=V)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.shape), x)[1], lambda x: x)
    with LargestLogits(V) as seen:
        with hooks:
            loss = model(ids, labels=ids)
        loss.backward()
    assert max(seen.rows.values()) == chunk
    assert not [shape for shape in kept if len(shape) and shape[-1] == V and shape.numel() > chunk * V]


# -------------------------------------------------------------------------------------------------------------- dtypes


@torch.no_grad()
def test_bfloat16_is_near_float32():
    """Eight bits of mantissa through five layers; positions past the original context, where rounded angles would
    show."""
    model, ids = tiny_model(), random_ids(2, LENGTH)
    exact = model(ids)
    model.bfloat16()
    rounded = model(ids)
    assert rounded.dtype == torch.bfloat16
    assert_close(rounded, exact, 0.1)
    assert float((rounded - exact).pow(2).mean() / exact.pow(2).mean()) < 0.02**2
    cache = model.new_cache(2)
    parts = [model(part, cache=cache) for part in ids.split([WINDOW + 2, *[1] * (LENGTH - WINDOW - 2)], dim=1)]
    assert_close(torch.cat(parts, dim=1), exact, 0.1)


def test_bfloat16_trains():
    model, ids = tiny_model().bfloat16(), random_ids(2, LENGTH)
    model(ids, labels=ids).backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(("call", "message"), [
    (lambda model, ids: model(ids[0]), r"shape \(B, T\) with T >= 1, not \(19,\)"),
    (lambda model, ids: model(ids[:, :0]), r"not \(2, 0\)"),
    (lambda model, ids: model(ids.float()), "must be integers"),
    (lambda model, ids: model(ids, attention_mask=ids[:, 1:]), r"attention_mask \(2, 18\) must have the shape"),
    (lambda model, ids: model(ids, document_ids=ids[:1]), r"document_ids \(1, 19\) must have the shape"),
    (lambda model, ids: model(ids, labels=ids[:, 1:]), r"labels \(2, 18\) must have the shape"),
    (lambda model, ids: model(ids, document_ids=ids, cache=model.new_cache(2)), "document_ids and cache exclude"),
    (lambda model, ids: model(ids, cache=model.new_cache(1)), "the cache has 1 rows, input_ids 2; use cache.rows"),
    (lambda model, ids: model(ids, cache=model.new_cache(2, 18)), "19 tokens do not fit a cache of max_length=18"),
    (lambda model, ids: tiny_model(rope="dynamic_ntk")(ids, document_ids=ids), "documents cannot be packed"),
])  # fmt: skip
def test_mistakes_are_explained(call, message):
    with pytest.raises(UserError, match=message) as error:
        call(tiny_model(), random_ids(2, LENGTH))
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_padding_takes_no_room_in_a_cache():
    """What counts is what a row reads, not how wide the call is."""
    model, ids = tiny_model(), random_ids(2, LENGTH)
    mask = torch.zeros_like(ids)
    mask[0, -5:], mask[1, :3] = 1, 1
    cache = model.new_cache(2, max_length=5)
    logits = model(ids, attention_mask=mask, cache=cache)
    assert cache.lengths.tolist() == [5, 3]
    assert_close(logits[0, -5:], model(ids[:1, -5:])[0])
    mask[1] = 1
    with pytest.raises(UserError, match="22 tokens do not fit"):
        model(ids, attention_mask=mask, cache=cache)
    assert cache.lengths.tolist() == [5, 3]


def test_projections_with_hooks_are_called():
    """Fast paths look past a projection only when its weight is all there is to it."""
    model, called = tiny_model(), []
    block = model.blocks[0]
    for linear in (block.mlp.gate_proj, block.mlp.up_proj, block.heads.mamba.x_proj):
        linear.register_forward_hook(lambda module, given, y: called.append(module) or 2 * y)
    ids = random_ids(1, 4)
    changed = model(ids)
    assert {block.mlp.gate_proj, block.mlp.up_proj, block.heads.mamba.x_proj} == set(called)
    for linear in set(called):
        linear._forward_hooks.clear()
        linear.weight.data *= 2
    torch.testing.assert_close(model(ids), changed)
