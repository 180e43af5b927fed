"""Weights of 8 and 4 bits: what is stored is what is computed with, and a checkpoint of them reads back the same."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model

from hymba import Hymba, UserError
from hymba.model import quant
from hymba.model.quant import QuantLinear, QuantMatrix, matrices, quantisation, quantize_
from hymba.ops import library

# signal to noise of normally distributed weights, in power: 8 bits with one scale a row, 4 bits with one for 32 inputs
NOISE = {8: 2e-4, 4: 1.2e-2}


@pytest.fixture(params=library.isas() or ["no library"])
def every_isa(request):
    """Each instruction set of this machine in turn; the rest of this file takes the best one."""
    if library.available():
        best = library.isa()
        library.use_isa(request.param)
        yield
        library.use_isa(best)
    else:
        yield


@pytest.mark.usefixtures("every_isa")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (16, 32), (33, 65), (100, 160)])
def test_stored_weights_are_near_the_original_ones(bits, rows, cols):
    weight = torch.randn(rows, cols)
    matrix = QuantMatrix.quantise(weight, bits)
    codes, scales = matrix.stored()
    assert (tuple(codes.shape), tuple(scales.shape)) == matrix.stored_shapes()
    expanded = matrix.expanded(0, rows)
    assert (expanded - weight).square().mean() <= NOISE[bits] * weight.square().mean() + 1e-12
    again = QuantMatrix(bits, rows, cols)
    again.load_stored(codes, scales)
    assert torch.equal(again.expanded(0, rows), expanded)
    ids = torch.randint(rows, (2, 3))
    assert torch.equal(matrix.rows_of(ids), expanded[ids])


@pytest.mark.usefixtures("every_isa")
def test_the_kernel_finds_the_least_error_of_its_definition():
    """Sums in another order may round a scale to its neighbour, so a group in a hundred may differ; errors may not."""
    torch.manual_seed(0)
    w = torch.cat([torch.randn(40, 5, 32), torch.randn(24, 5, 32) ** 3, torch.zeros(1, 5, 32)])  # (rows, groups, 32)
    codes, scales = quant._quantise_int4(w)
    found_codes, found_scales = quant._quantise(w.flatten(1), 4)
    assert (found_scales == scales).float().mean() > 0.99
    error, found_error = (
        (w - s.float()[..., None] * torch.tensor(quant.LEVELS)[c.long()].view_as(w)).square().sum()
        for c, s in ((codes, scales), (found_codes, found_scales))
    )
    assert found_error <= (1 + 1e-4) * error


@pytest.mark.usefixtures("every_isa")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("batch", [1, 3, 16, 29, 40])
def test_products_are_those_of_the_stored_weights(bits, batch):
    """But for the activations, rounded to 8 bits in groups: an error of at most half a step of each."""
    weight, x, size = torch.randn(50, 96), torch.randn(batch, 96), {8: 64, 4: 32}[bits]
    matrix = QuantMatrix.quantise(weight, bits)
    exact = F.linear(x, matrix.expanded(0, 50))
    groups = F.pad(x, (0, -96 % size)).unflatten(1, (-1, size))
    step = groups.abs().amax(-1, keepdim=True).expand_as(groups).flatten(1)[:, :96] / 127
    bound = F.linear(step / 2, matrix.expanded(0, 50).abs()) + 1e-4
    with torch.no_grad():
        product = matrix.product(x)
        assert ((product - exact).abs() <= bound).all()
        if library.available():  # PyTorch's product makes no such promise
            assert all(torch.equal(matrix.product(row[None])[0], y) for row, y in zip(x, product, strict=True))


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"mlp_activation": "relu2", "n_meta": 0}], ids=str)
@pytest.mark.parametrize("shard", [None, 20_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_quantised_checkpoint_reads_back_the_same(kind, changes, shard, dtype, tmp_path):
    model = tiny_model(**changes).to(dtype)
    for block in model.blocks:  # as a checkpoint is loaded
        block.heads.mamba.A_log.data = block.heads.mamba.A_log.data.float()
    quantize_(model, kind)
    ids = torch.randint(1, model.config.vocab_size, (2, 20))
    with torch.no_grad():
        expected = model(ids)
    model.save_pretrained(tmp_path, max_shard_bytes=shard)
    again = Hymba.from_pretrained(tmp_path)
    assert quantisation(again) == kind
    assert len(list(matrices(again))) == len(list(matrices(model)))
    with torch.no_grad():
        assert torch.equal(again(ids), expected)


def test_mistakes(tmp_path):
    model = tiny_model()
    with pytest.raises(UserError, match="int3"):
        quantize_(model, "int3")
    quantize_(model, "int4")
    with pytest.raises(UserError, match="already"):
        quantize_(model, "int8")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for bad in (5, {"bits": 5}, {**config["quantization"], "group": 64}, {**config["quantization"], "extra": 1}):
        path.write_text(json.dumps({**config, "quantization": bad}))
        with pytest.raises(UserError, match=r"config\.json: quantization"):
            Hymba.from_pretrained(tmp_path)
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "quantization"}))
    with pytest.raises(UserError, match="not part of this model"):
        Hymba.from_pretrained(tmp_path)


@pytest.mark.usefixtures("every_isa")
@pytest.mark.parametrize(("rows", "cols"), [(33, 70), (48, 32), (100, 1600)])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_product_does_not_depend_on_threads_or_on_other_rows(rows, cols, bits):
    torch.manual_seed(0)
    layer = QuantLinear(QuantMatrix.quantise(torch.randn(rows, cols), bits))
    x, before = torch.randn(70, cols), torch.get_num_threads()
    expected = layer(x)
    for n in (1, 2):
        torch.set_num_threads(n)
        alone = [layer(part) for part in x.split([1, 2, 5, 9, 33, 20])]  # every kind of tile
        torch.set_num_threads(before)
        found = torch.cat(alone)
        if library.available():
            assert torch.equal(found, expected)
        else:  # PyTorch's product adds in an order that depends on the number of rows
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
