"""The model against the official implementation; `golden/README.md` says what the numbers are and where from."""

from functools import lru_cache

import pytest
import torch
from conftest import GOLDEN, GOLDEN_CASES, assert_close
from safetensors.torch import load_file
from torch import Tensor

from hymba import Hymba
from hymba.convert import from_official_shape, stored_parameters

pytestmark = pytest.mark.parametrize("case", GOLDEN_CASES)
each_prompt = pytest.mark.parametrize("tag", ["short", "long"])


@lru_cache
def golden(case: str) -> tuple[Hymba, dict[str, Tensor]]:
    return Hymba.from_pretrained(GOLDEN / case), load_file(GOLDEN / case / "golden.safetensors")


class Watch:
    """What a module returns in a forward pass; heads are called first for the meta tokens, then for the text.

    replace: (1, M + T, D) read in place of what the module is given
    """

    def __init__(self, module: torch.nn.Module, replace: Tensor | None = None):
        self.outputs: list = []
        self._replace = replace
        self._handles = [
            module.register_forward_pre_hook(self._before),
            module.register_forward_hook(lambda module, arguments, output: self.outputs.append(output)),
        ]

    def _before(self, module, arguments):
        if self._replace is None:
            return None
        return self._replace[0], *arguments[1:]

    def joined(self, pick=lambda output: output) -> Tensor:
        """Meta tokens and text together, as the official implementation has them."""
        meta, text = map(pick, self.outputs)
        return torch.cat([meta, text], dim=1)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for handle in self._handles:
            handle.remove()


@torch.no_grad()
def test_logits(case):
    model, expected = golden(case)
    assert_close(model(expected["input_ids"]), expected["logits"])


@torch.no_grad()
def test_hidden_states(case):
    model, expected = golden(case)
    ids, states = expected["input_ids"][:1], expected["hidden_states_row0"]
    watched = [Watch(block) for block in model.blocks]
    *_, (last, _) = model.layer_outputs(ids)
    embeddings = torch.cat([model.meta_tokens, model.embedding(ids[0])])
    layers = [embeddings, *(sum(watch.outputs[0][:2]) for watch in watched)]
    for watch in watched:
        watch.__exit__()
    assert_close(layers[-1][model.config.n_meta :], last[0])
    layers[-1] = model.norm(layers[-1])
    for ours, official in zip(layers, states, strict=True):
        assert_close(ours, official)


def test_loss_and_gradients(case):
    model, expected = golden(case)
    loss = model(expected["input_ids"], labels=expected["input_ids"])
    loss.backward()
    assert abs(loss.item() - expected["loss"].item()) < 1e-5
    ours = {official: (name, p.grad) for name, official, p in stored_parameters(model)}
    listed = [key for key in expected if key.startswith("grad.")]
    assert len(listed) == 16
    for key in listed:
        name, gradient = ours[key.removeprefix("grad.")]
        assert_close(gradient, from_official_shape(name, expected[key]), 1e-4)
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("layer", [0, 1])
@torch.no_grad()
def test_block_internals(case, layer):
    model, expected = golden(case)
    heads, block = model.blocks[layer].heads, f"block{layer}"
    with (
        Watch(heads, replace=expected[f"{block}_input"]) as whole,
        Watch(heads.attention) as attention,
        Watch(heads.mamba) as mamba,
    ):
        model.hidden(expected["input_ids"][:1])
    [(output, read, conv, ssm)] = whole.outputs
    assert_close(output, expected[f"{block}_output"][0])
    if f"{block}_attn_out" in expected:
        assert_close(attention.joined(), expected[f"{block}_attn_out"])
        assert_close(mamba.joined(lambda output: output[0]), expected[f"{block}_scan_out"])
    # in both parts the new keys are the last that are read
    assert_close(torch.cat([sources[-1].k for sources in read], dim=2), expected[f"{block}_key"])
    assert_close(torch.cat([sources[-1].v for sources in read], dim=2), expected[f"{block}_value"])
    assert_close(conv, newest_inputs(expected[f"{block}_conv_state"]))
    assert_close(ssm, expected[f"{block}_ssm_state"])


def newest_inputs(conv_state: Tensor) -> Tensor:
    """The official conv state (1, E, K) has an oldest column that nobody reads -> ours, (1, K - 1, E)"""
    return conv_state[:, :, 1:].transpose(1, 2)


def trajectory(expected: dict[str, Tensor], tag: str) -> tuple[Tensor, int]:
    """The ids that were fed, and how many of them are the prompt."""
    prompt, new = expected[f"gen_{tag}_prompt_ids"], expected[f"gen_{tag}_new_ids"]
    return torch.cat([prompt, new[:, :-1]], dim=1), prompt.shape[1]


def first_departure(window: int, prompt: int) -> int:
    """The row from which on official decoding sees one key less than the model was trained with."""
    return window + 1 - prompt if prompt <= window else 1


@each_prompt
@torch.no_grad()
def test_trajectory_in_one_piece(case, tag):
    model, expected = golden(case)
    ids, prompt = trajectory(expected, tag)
    assert_close(model(ids)[0, prompt - 1 :], expected[f"gen_{tag}_logits_full"])


@each_prompt
@torch.no_grad()
def test_trajectory_decoded_with_the_cache(case, tag):
    """Decoding has the trained window: equal to the official full forward in every row, and to official decoding, ids
    included, in the rows before that departs from it. The first two layers' states never depend on the window."""
    model, expected = golden(case)
    ids, prompt = trajectory(expected, tag)
    cache = model.new_cache(1, max_length=ids.shape[1])
    steps = [model(ids[:, :prompt], cache=cache)[:, -1]]
    steps += [model(ids[:, t : t + 1], cache=cache)[:, -1] for t in range(prompt, ids.shape[1])]
    logits = torch.cat(steps)
    assert_close(logits, expected[f"gen_{tag}_logits_full"])

    same = first_departure(model.config.window, prompt)
    assert_close(logits[:same], expected[f"gen_{tag}_logits_cached"][:same])
    assert torch.equal(logits[:same].argmax(-1), expected[f"gen_{tag}_new_ids"][0, :same])

    for layer in (0, 1):
        assert_close(cache.conv[layer], newest_inputs(expected[f"gen_{tag}_final_conv_state_layer{layer}"]))
        assert_close(cache.ssm[layer], expected[f"gen_{tag}_final_ssm_state_layer{layer}"])
    c = model.config
    newest = torch.arange(ids.shape[1] - c.window, ids.shape[1]) % (
        c.window + 1
    )  # where the ring has the last W tokens
    for name, store, meta in (("key", cache.k, cache.meta[1].meta.k), ("value", cache.v, cache.meta[1].meta.v)):
        ours = torch.cat([meta, store[1][:, :, newest]], dim=2)
        assert_close(ours, expected[f"gen_{tag}_final_{name}_layer1"])


@each_prompt
@torch.no_grad()
def test_what_is_stored_is_what_decoding_needs(case, tag):
    """Rows per layer as in the official cache, which keeps one key less in window layers and none in consumers."""
    model, expected = golden(case)
    ids, _ = trajectory(expected, tag)
    cache, M = model.new_cache(1, max_length=ids.shape[1]), model.config.n_meta
    for plan, official in zip(model.config.layers, expected[f"gen_{tag}_kv_len"][-1].tolist(), strict=True):
        ours = M + cache.k[plan.index].shape[2] if plan.produces_kv else 0
        assert ours == official + (plan.produces_kv and plan.window is not None)
