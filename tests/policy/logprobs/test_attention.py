"""Attention over one pack, against softmax over the keys that each token may see."""

import pytest
import torch
from torch import Tensor, nn

from halos.data.batches import packing
from halos.data.batches.packing import Pack, pack
from halos.data.rows.token_rows import Row
from halos.policy.logprobs.attention import PackedAttention, attend, repeats_heads
from halos.policy.logprobs.flex import ScoreOptions
from tests import tiny

ROWS = [
    *tiny.rows(3, branches=2, seed=2),
    *tiny.conversation(branches=2),
    Row("long", 7, tuple(range(12)), (tuple(range(9)), tuple(range(11)))),
]
MODULE = nn.Identity()


def states(count: int, heads: int, seed: int) -> Tensor:
    return torch.randn(1, heads, count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(part: Pack, query: Tensor, key: Tensor, value: Tensor, window: int | None, softcap: float | None) -> Tensor:
    """One query at a time: [1, N, heads, width]."""
    n, before = query.shape[2], key.shape[2] - query.shape[2]
    out = torch.zeros(1, n, query.shape[1], 4, dtype=torch.float64)
    for i in range(n):
        at = before + i
        visible = [
            j
            for j in range(key.shape[2])
            if part.node[j] <= part.node[at] <= part.last[j]
            and part.position[j] <= part.position[at]
            and (window is None or part.position[at] - part.position[j] < window)
        ]
        for head in range(query.shape[1]):
            group = head // (query.shape[1] // key.shape[1])
            scores = key[0, group, visible] @ query[0, head, i] / 2
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            out[0, i, head] = scores.softmax(0) @ value[0, group, visible]
    return out


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("heads", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.long)])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 3, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("grouped", "dense", "kernel"),
    [(0, 1000, "pieces"), (30, 1000, "pieces"), (0, 10, "pieces"), (30, 10, "flex")],
)
def test_it_is_softmax_over_what_each_token_may_see(
    heads: int,
    softcap: float | None,
    window: int | None,
    grouped: int,
    dense: int,
    kernel: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packing, "GROUPED_TREES_MAX_TOKENS", grouped)
    monkeypatch.setattr(packing, "DENSE_TREE_MAX_TOKENS", dense)
    first, second = pack(ROWS, width=11, mismatched=True)
    options = ScoreOptions(scaling=0.5, window=window, softcap=softcap)
    n = len(first.input_ids)
    query, key, value = states(n, 4, 0), states(n, heads, 1), states(n, heads, 2)
    attention = PackedAttention(first, keep=True, kernel=kernel)
    found = attention(MODULE, query, key, value, options)
    torch.testing.assert_close(found, by_hand(first, query, key, value, window, softcap), rtol=0, atol=1e-12)
    # The second pack sees the prompts of the first.
    m = len(second.input_ids)
    query, key2, value2 = states(m, 4, 3), states(m, heads, 4), states(m, heads, 5)
    found = PackedAttention(second, earlier=attention.kept, kernel=kernel)(MODULE, query, key2, value2, options)
    key, value = (torch.cat([old[:, :, first.kept], new], 2) for old, new in ((key, key2), (value, value2)))
    torch.testing.assert_close(found, by_hand(second, query, key, value, window, softcap), rtol=0, atol=1e-12)


def test_kept_keys_and_values_are_detached_and_those_that_the_next_pack_continues() -> None:
    rows = [Row("a", 0, (1, 2, 3), ((4, 5), (6, 7))), Row("b", 1, (8, 9), ((4, 5), (6,)))]
    part, _ = pack(rows, width=2, mismatched=True)
    n = len(part.input_ids)
    key = states(n, 2, 0).requires_grad_()
    attention = PackedAttention(part, keep=True)
    attention(MODULE, states(n, 2, 1), key, key, ScoreOptions())
    kept, _ = attention.kept[MODULE]
    assert not kept.requires_grad
    assert torch.equal(kept, key[:, :, :3])  # the mismatched completion of the second prompt has no token to feed


def test_nothing_is_kept_unless_asked_for() -> None:
    (part,) = pack(ROWS, width=11)
    n = len(part.input_ids)
    attention = PackedAttention(part)
    attention(MODULE, states(n, 2, 0), states(n, 2, 1), states(n, 2, 2), ScoreOptions())
    assert not attention.kept


def test_dropout_drops() -> None:
    query, key, value = (torch.ones(1, 1, 64, 4) for _ in range(3))
    for softcap in (None, 1.0):
        assert attend(query, key, value, None, ScoreOptions(softcap=softcap)).std() < 1e-6
        assert attend(query, key, value, None, ScoreOptions(dropout=0.5, softcap=softcap)).std() > 0.01


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_on_cpu_bfloat16_states_are_attended_to_in_float32(masked: bool, autocast: bool) -> None:
    mask = torch.ones(5, 5, dtype=torch.bool).tril().fill_diagonal_(True) if masked else None
    low = [states(5, heads, seed).bfloat16().requires_grad_() for seed, heads in enumerate((4, 2, 2))]
    wide = [value.detach().float().requires_grad_() for value in low]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = attend(low[0], low[1], low[2], mask, ScoreOptions(scaling=0.5))
        if autocast:  # rotary embeddings leave queries and keys in float32
            assert torch.equal(found, attend(low[0].float(), low[1].float(), low[2], mask, ScoreOptions(scaling=0.5)))
    expected = attend(wide[0], wide[1], wide[2], mask, ScoreOptions(scaling=0.5)).bfloat16()
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    for mine, other in zip(
        torch.autograd.grad(found.float().square().sum(), low),
        torch.autograd.grad(expected.float().square().sum(), wide),
        strict=True,
    ):
        assert torch.equal(mine, other.bfloat16())


@pytest.mark.parametrize(
    ("device", "dtype", "masked", "expected"),
    [
        ("cuda", torch.bfloat16, False, False),
        ("cuda", torch.float16, False, False),
        ("cuda", torch.bfloat16, True, True),
        ("cuda", torch.float32, False, True),
        ("cuda", torch.float32, True, True),
        ("cpu", torch.float32, True, False),
    ],
)
def test_grouped_heads_are_repeated_where_no_fused_kernel_knows_them(
    device: str, dtype: torch.dtype, masked: bool, expected: bool
) -> None:
    assert repeats_heads(device, dtype, masked=masked) == expected


def test_repeated_heads_attend_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 5, 4, dtype=torch.float64) for heads in (6, 2, 2))
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    expected = [attend(query, key, value, part, ScoreOptions()) for part in (None, mask)]
    monkeypatch.setattr("halos.policy.logprobs.attention.repeats_heads", lambda *_, masked: True)
    found = [attend(query, key, value, part, ScoreOptions()) for part in (None, mask)]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
