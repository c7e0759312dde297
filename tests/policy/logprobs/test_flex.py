"""FlexAttention's masks leave out nothing that a token sees, and hardly anything else is looked at."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from halos.data.batches import packing
from halos.data.batches.collate import collate
from halos.data.batches.packing import Pack, pack
from halos.data.rows.token_rows import Row
from halos.policy.loading import ModelSpec
from halos.policy.logprobs import attention, flex, packed
from halos.policy.logprobs.attention import PackedAttention
from halos.policy.logprobs.completions import completion_logprobs
from halos.policy.logprobs.flex import ScoreOptions, block_mask
from halos.policy.logprobs.head import HeadOptions
from halos.policy.logprobs.packed import attend_by, can_pack
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

LONG = Row("long", 7, tuple(n % 7 for n in range(23)), (tuple(range(9)), tuple(range(11))))
ROWS = [*tiny.rows(4, branches=2, seed=2), LONG, *tiny.conversation(branches=2)]


def visible(part: Pack, window: int | None) -> Tensor:
    """[N, P + N], pair by pair."""
    before = len(part.node) - len(part.input_ids)
    seen = torch.zeros(len(part.input_ids), len(part.node), dtype=torch.bool)
    for query in range(len(part.input_ids)):
        own = query + before
        for key in range(len(part.node)):
            distance = int(part.position[own] - part.position[key])
            seen[query, key] = (
                part.node[key] <= part.node[own] <= part.last[key]
                and distance >= 0
                and (window is None or distance < window)
            )
    return seen


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("dense", [1000, 10])
@pytest.mark.parametrize("size", [4, 16, 128])
def test_blocks_hold_all_that_is_seen(
    size: int, dense: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex, "BLOCK_TOKENS", size)
    monkeypatch.setattr(packing, "GROUPED_TREES_MAX_TOKENS", 8)
    monkeypatch.setattr(packing, "DENSE_TREE_MAX_TOKENS", dense)
    for part in pack(ROWS, width=11, mismatched=True):
        mask, seen = block_mask(part, window), visible(part, window)
        listed = mask.to_dense()[0, 0].bool().repeat_interleave(size, 0).repeat_interleave(size, 1)
        n, keys = seen.shape
        assert not (seen & ~listed[:n, :keys]).any()
        grid = [torch.arange(count) for count in (1, 1, n, keys)]
        found = torch.stack([mask.mask_mod(grid[0], grid[1], query, grid[3]) for query in grid[2]])
        assert torch.equal(found, seen)
        if size == 4:
            assert listed.float().mean() < 0.45  # of a square with eight trees in it, causal


def test_a_key_block_behind_all_queries_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "BLOCK_TOKENS", 8)
    (part,) = pack([Row("one", 0, tuple(range(32)), ((1, 2, 3),))], width=3)
    assert torch.equal(block_mask(part, None).to_dense()[0, 0], torch.ones(5, 5, dtype=torch.int32).tril())


SOME = ("llama", "gpt2", "gemma2")


@pytest.mark.long
@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=[] if name in SOME else [pytest.mark.slow]) for name in tiny.ARCHITECTURES],
)
def test_log_probs_are_those_of_separate_calls(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    whole = attention.flex_attend  # type: ignore[attr-defined]

    def counted(*args: Any, **options: Any) -> Tensor:
        calls.append(1)
        return whole(*args, **options)

    monkeypatch.setattr(attention, "flex_attend", counted)
    batch = collate(ROWS, mismatched=True, packing=True)
    model = tiny.exact(tiny.model(architecture, dtype=torch.float64))
    with torch.no_grad():  # PyTorch has no backward pass of it for CPUs
        expected = completion_logprobs(model, batch, HeadOptions(4)).tokens
        assert not calls
        packed._can_pack.clear()
        attend_by(model, "flex")
        assert can_pack(model)
        found = completion_logprobs(model, batch, HeadOptions(4)).tokens
    assert len(calls) == 4 * model.config.num_hidden_layers  # two packs to try it out, and two
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_without_cuda_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModelSpec(path=str(tiny.save(tmp_path)), packed_attention="flex")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^model\.packed_attention: flex needs a CUDA device, found none; .*=pieces"):
        spec.check()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    spec.check()


def test_with_dropout_pieces_are_attended_to_one_by_one() -> None:
    (part,) = pack(ROWS, width=11)
    query, key, value = (torch.ones(1, 1, len(part.input_ids), 4) for _ in range(3))
    by_flex = PackedAttention(part, kernel="flex")
    assert by_flex(torch.nn.Identity(), query, key, value, ScoreOptions()).std() < 1e-6
    assert by_flex(torch.nn.Identity(), query, key, value, ScoreOptions(dropout=0.5)).std() > 0.01


def test_enough_versions_are_kept_for_models_with_windows() -> None:
    import torch._dynamo

    flex._flex_function.cache_clear()
    with torch._dynamo.config.patch(recompile_limit=8):
        flex._flex_function("cuda")
        assert torch._dynamo.config.recompile_limit == flex.MAX_VERSIONS > 2 * 2 * 2 * 2


def test_versions_are_kept_in_every_thread_where_pytorch_can(monkeypatch: pytest.MonkeyPatch) -> None:
    def before(function: Any, *, dynamic: bool | None = None) -> Any:
        return function

    def since(function: Any, *, recompile_limit: int | None = None) -> Any:
        return function

    monkeypatch.setattr(torch, "compile", since)
    assert flex.keep_versions(64) == {"recompile_limit": 64}
    monkeypatch.setattr(torch, "compile", before)
    assert flex.keep_versions(64) == {}
