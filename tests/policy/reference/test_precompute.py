"""Reference log-probs computed beforehand are those of the live reference."""

import functools
import pickle
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from halos.data.batches.collate import collate
from halos.data.batches.reference_entries import Entries
from halos.data.batches.reference_table import ReferenceTable, completions
from halos.data.rows.token_rows import Row
from halos.policy.backbone import Backbone
from halos.policy.logprobs.completions import completion_logprobs
from halos.policy.reference import precompute
from halos.policy.reference.cache import ReferenceCache, model_key
from halos.policy.reference.precompute import reference_table
from tests import tiny
from tests.fork import run_ranks

ROWS = [*tiny.rows(9, branches=2, seed=5), Row("again", 0, tiny.rows(9, seed=5)[2].prompt, ((1, 2), (3,)))]


def table(folder: Path, model: Any = None, rows: Collection[Row] = ROWS, **options: Any) -> ReferenceTable:
    model, head_chunk = model or tiny.model(dtype=torch.float64), options.pop("head_chunk", None)
    backbone = Backbone(model, with_reference=False, head_chunk=head_chunk)
    made, seconds = reference_table(backbone, rows, folder=folder, precision="32-true", **options)
    assert seconds > 0
    return made


def counted(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Completions of each forward from here on."""
    seen: list[int] = []

    score = precompute._score

    def counting(backbone: Any, work: Any, batch: Any) -> Any:
        seen.append(len(batch))
        return score(backbone, work, batch)

    monkeypatch.setattr(precompute, "_score", counting)
    return seen


# Values


@pytest.mark.parametrize(("tokens", "block"), [(1, 9), (30, 4), (4096, 1 << 14)])
@pytest.mark.parametrize("options", [{}, {"share_prompts": False}, {"packing": False}, {"head_chunk": 3}], ids=str)
def test_they_are_those_of_the_live_reference(
    tokens: int, block: int, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precompute, "TOKENS", tokens)
    monkeypatch.setattr(precompute, "BLOCK", block)
    model = tiny.model(dtype=torch.float64)
    batch = collate(ROWS, mismatched=True, reference=table(tmp_path, model, **options))
    backbone = Backbone(model, with_reference=True)
    expected = completion_logprobs(backbone.reference, batch).tokens
    found = Backbone(model, with_reference=False).reference_logprobs(batch)
    assert found.tokens.dtype == torch.float32
    assert torch.equal(found.mask, batch.mask)
    torch.testing.assert_close(found.tokens.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_at_the_start_policy_and_reference_agree_to_a_millionth(architecture: str, tmp_path: Path) -> None:
    model = tiny.model(architecture)
    made = table(tmp_path, model)
    for rows in (ROWS, ROWS[:3], ROWS[4:5]):
        batch = collate(rows, mismatched=True, packing=True, reference=made)
        policy, reference = Backbone(model, with_reference=False).logprobs(batch), batch.reference
        torch.testing.assert_close(policy.tokens, reference, rtol=1e-6, atol=2e-6)


def test_dropout_and_gradients_are_off(tmp_path: Path) -> None:
    model = tiny.model("gpt2", attn_pdrop=0.5, embd_pdrop=0.5, resid_pdrop=0.5)
    state = torch.get_rng_state()
    one, two = table(tmp_path / "one", model), table(tmp_path / "two", model)
    assert all(torch.equal(one.entries[key], two.entries[key]) for key in one.entries)
    assert not any(values.requires_grad for values in one.entries.values())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


# What is computed


def test_what_is_known_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model(dtype=torch.float64)
    first = table(tmp_path, model, ROWS[:5])
    seen = counted(model, monkeypatch)
    again = table(tmp_path, model, ROWS[:5])
    assert not seen
    assert all(torch.equal(again.entries[key], first.entries[key]) for key in first.entries)
    assert first.entries.keys() == again.entries.keys() == completions(ROWS[:5]).keys()
    more = table(tmp_path, model, ROWS)
    assert sum(seen) == len(completions(ROWS)) - len(completions(ROWS[:5]))
    assert more.entries.keys() == completions(ROWS).keys()


def test_a_completion_of_several_blocks_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model(dtype=torch.float64)
    expected = table(tmp_path / "whole", model)
    seen = counted(model, monkeypatch)
    monkeypatch.setattr(precompute, "BLOCK", 2)
    made = table(tmp_path / "blocks", model, [*ROWS, *ROWS[:4]])
    assert sum(seen) == made.computed == len(completions(ROWS)) == len(made.entries)
    assert len(list((tmp_path / "blocks").rglob("*.safetensors"))) == len(ROWS) // 2
    for key, values in expected.entries.items():
        torch.testing.assert_close(made.entries[key], values, rtol=1e-6, atol=1e-6)
    assert table(tmp_path / "blocks", model, [*ROWS, *ROWS[:4]]).computed == 0


def test_ranks_that_read_other_files_are_sent_what_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tiny.rows(40, branches=2, seed=5)
    first = table(tmp_path, rows=rows)
    sent: list[int] = []

    def recorded(make: Any) -> Any:
        sent.append(len(pickle.dumps(made := make())))
        return made

    monkeypatch.setattr(precompute, "from_rank_zero", recorded)
    cache = ReferenceCache(tmp_path, model_key(tiny.model(dtype=torch.float64), "32-true"))
    wanted = list(first.entries)[:20]
    assert precompute._known(cache, wanted).keys() == first.entries.keys()
    assert not sent, "one process reads the cache itself"
    monkeypatch.setattr(precompute, "_alone", lambda: False)
    again = precompute._known(cache, wanted)
    assert again.keys() == first.entries.keys()
    assert sent.pop() < 200, "the seal of one part: the ranks read the same file"
    monkeypatch.setattr(precompute, "all_max", lambda _: [1])  # another rank has other files
    again = precompute._known(cache, wanted)
    assert set(again) == set(wanted)
    assert all(torch.equal(again[key], first.entries[key]) for key in wanted)
    values = sum(4 * len(first.entries[key]) for key in wanted)
    assert values < sent[-1] < values + 32 * len(wanted) + 500


@pytest.mark.parametrize("harm", ["nothing", "other numbers", "no file"])
def test_numbers_are_mapped_only_from_a_file_that_has_the_same(
    harm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precompute, "_alone", lambda: False)
    found = table(tmp_path / "in memory").entries
    assert isinstance(found, Entries)
    cache = ReferenceCache(tmp_path, "a" * 64)
    part = cache.write(found)
    if harm == "other numbers":
        part = ReferenceCache(tmp_path / "other", "a" * 64).write({key: found[key] + 1 for key in found})
    elif harm == "no file":
        part = tmp_path / "none"
    kept = precompute._mapped(cache, part, found)
    assert (kept is found) == (harm != "nothing")
    assert all(torch.equal(kept[key], found[key]) for key in found)


def test_other_weights_are_another_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table(tmp_path)
    other = tiny.model(dtype=torch.float64, seed=1)
    seen = counted(other, monkeypatch)
    table(tmp_path, other)
    assert sum(seen) == len(completions(ROWS))


def test_a_damaged_cache_is_made_anew(tmp_path: Path) -> None:
    expected = table(tmp_path)
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    found = table(tmp_path)
    assert all(torch.equal(found.entries[key], expected.entries[key]) for key in expected.entries)
    (path,) = tmp_path.rglob("*.safetensors")
    assert len(path.read_bytes()) > 100


def test_forwards_are_of_limited_size_and_tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precompute, "TOKENS", 30)
    sizes: list[int] = []

    def track(work: Any) -> Any:
        for part in work:
            prompts = {row.prompt for _, row in part}
            sizes.append(sum(map(len, prompts)) + sum(len(row.branches[0]) for _, row in part))
            yield part

    assert table(tmp_path, track=track).entries.keys() == completions(ROWS).keys()
    assert len(sizes) > 3
    assert max(sizes) <= 30


# Ranks


def on_a_rank(folder: Path, shared: bool) -> tuple[Mapping[bytes, torch.Tensor], int, int]:
    dist.init_process_group("gloo")
    precompute.TOKENS, precompute.BLOCK = 30, 7
    seen: list[Any] = []

    def track(work: Any) -> Any:
        seen.extend(work)
        return work

    own = folder / ("shared" if shared else str(dist.get_rank()))
    made = table(own, track=track)
    return dict(made.entries), len(seen), table(own).computed


@pytest.mark.ranks
@pytest.mark.parametrize("shared", [False, True])
def test_ranks_share_the_work_and_all_have_the_result(
    shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precompute, "TOKENS", 30)
    monkeypatch.setattr(precompute, "BLOCK", 7)
    alone: list[Any] = []
    expected = table(tmp_path / "alone", track=lambda work: alone.extend(work) or work)
    (zero, work, again), (one, other, again_other) = run_ranks(functools.partial(on_a_rank, tmp_path, shared))
    assert work + other == len(alone) > 3
    assert 0 <= work - other <= 2  # one forward in each of two blocks
    assert again == again_other == 0
    assert zero.keys() == one.keys() == expected.entries.keys()
    for key, values in expected.entries.items():
        assert torch.equal(zero[key], one[key])
        torch.testing.assert_close(zero[key], values, rtol=1e-6, atol=1e-6)
    assert list((tmp_path / ("shared" if shared else "0")).rglob("*.safetensors"))
    assert not (tmp_path / "1").exists()
