"""Variable-length attention sees what the tree of a pack says, and no more."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from halos.data.batches.collate import collate
from halos.data.batches.packing import map_tensors, pack
from halos.policy.checkpointing import checkpoint_layers
from halos.policy.logprobs import attention, varlen
from halos.policy.logprobs.completions import completion_logprobs
from halos.policy.logprobs.flex import ScoreOptions, block_mask
from halos.policy.logprobs.head import HeadOptions
from halos.policy.logprobs.packed import attend_by, can_pack
from halos.policy.logprobs.varlen import sequences_of, varlen_attend
from tests import tiny
from tests.policy.logprobs.test_flex import ROWS, visible


def one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_edges: Tensor,
    key_edges: Tensor,
    max_queries: int,
    max_keys: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """FlashAttention's contract: sequence by sequence, with the masks aligned to the last key."""
    outputs = []
    for (q0, q1), (k0, k1) in zip(pairwise(query_edges.tolist()), pairwise(key_edges.tolist()), strict=True):
        assert q1 - q0 <= max_queries
        assert k1 - k0 <= max_keys
        behind = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0) - torch.arange(k1 - k0)
        left, right = window_size
        seen = (behind >= -right) & ((behind <= left) | (left < 0))
        q, k, v = (states.transpose(0, 1)[None] for states in (query[q0:q1], key[k0:k1], value[k0:k1]))
        output = scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=enable_gqa)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("mismatched", [True, False])
def test_the_keys_of_each_query_are_those_of_the_tree(share: bool, mismatched: bool) -> None:
    for item in pack(ROWS, width=11, mismatched=mismatched, share_prompts=share):
        sequences, seen = sequences_of(item), torch.zeros(len(item.input_ids), len(item.node), dtype=torch.bool)
        edges = zip(pairwise(sequences.query_edges.tolist()), pairwise(sequences.key_edges.tolist()), strict=True)
        for (q0, q1), (k0, k1) in edges:
            for query in range(q0, q1):
                seen[query, sequences.places[k0 : k1 - (q1 - 1 - query)]] = True
        assert torch.equal(seen, visible(item, None))


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_log_probs_and_gradients_are_those_of_pieces(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*args: Any, **options: Any) -> Tensor:
        calls.append(options["window_size"])
        return one_by_one(*args, **options)

    monkeypatch.setattr(varlen, "_varlen_function", lambda: counted)
    batch = collate(ROWS, mismatched=True, packing=True)
    model = tiny.exact(tiny.model(architecture, dtype=torch.float64))
    results = []
    for kernel in ("pieces", "varlen"):
        attend_by(model, kernel)
        model.zero_grad()
        tokens = completion_logprobs(model, batch, HeadOptions(4)).tokens
        tokens.sin().sum().backward()
        results.append((tokens.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
        assert len(calls) == (0 if kernel == "pieces" else 2 * model.config.num_hidden_layers)
    (tokens, gradients), (other_tokens, others) = results
    torch.testing.assert_close(other_tokens, tokens, rtol=0, atol=1e-10)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=0, atol=1e-9)
    window = getattr(model.config, "sliding_window", None)
    assert set(calls) == {(-1 if window is None else window - 1, 0)}


def test_a_packs_table_is_made_once_for_all_layers_and_their_second_run(monkeypatch: pytest.MonkeyPatch) -> None:
    made, calls = [], []
    monkeypatch.setattr(attention, "sequences_of", lambda item: made.append(item) or sequences_of(item))
    monkeypatch.setattr(varlen, "_varlen_function", lambda: lambda *a, **o: calls.append(1) or one_by_one(*a, **o))
    model = tiny.model()
    checkpoint_layers(model, True)
    assert can_pack(model)  # its trial is over
    attend_by(model, "varlen")
    batch = collate(ROWS, mismatched=True, packing=True)
    completion_logprobs(model.train(), batch, HeadOptions(4)).tokens.sum().backward()
    layers = model.config.num_hidden_layers
    assert len(calls) == 3 * layers  # the second pack has no backward pass
    assert [len(item.input_ids) for item in made] == [len(item.input_ids) for item in batch.packs]


def test_tables_are_made_without_the_values_on_the_device() -> None:
    for item in pack(ROWS, width=11, mismatched=True):
        on_meta = map_tensors(item, lambda tensor: tensor.to("meta"))  # where reading a value raises
        sequences, expected = sequences_of(on_meta), sequences_of(item)
        assert sequences.places.is_meta
        assert sequences.places.shape == expected.places.shape
        assert sequences[3:] == expected[3:]
        assert block_mask(on_meta, None).kv_indices.is_meta


def test_scores_with_a_cap_are_refused() -> None:
    (item,) = pack(ROWS, width=11)
    states = torch.ones(1, 1, len(item.input_ids), 4)
    with pytest.raises(ValueError, match="expected scores without a cap"):
        varlen_attend(states, states, states, sequences_of(item), ScoreOptions(softcap=5.0))
