"""The data module: how many steps, which examples, in which order, and where a resumed run goes on."""

import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from halos.data.batches.batch import Batch
from halos.data.batches.collate import Batches
from halos.data.batches.loader import ResumableLoader
from halos.data.module import PreferenceDataModule
from halos.data.preparation.needs import DataNeeds, RowNeeds
from halos.data.records.record import Completion, Message, Record, prompt_key
from halos.data.sources.base import Records, Source
from tests import tiny


class Listed(Source):
    """Records from lists."""

    name = "listed"

    def __init__(self, train: list[Record], val: list[Record] | None = None) -> None:
        self._train, self._val = train, val

    def train(self) -> Records:
        return Records(self._train, Counter({"empty completion": 2}))

    def val(self) -> Records | None:
        return None if self._val is None else Records(self._val, Counter())


def record(n: int, *, prompt: str = "", desirable: bool | None = None) -> Record:
    """One labelled completion of as many words as 1 + n modulo 4; every other record is desirable."""
    text = " ".join(["good"] * (1 + n % 4))
    label = n % 2 == 0 if desirable is None else desirable
    return Record(f"f:{n}", prompt or " ".join(["hello"] * (1 + n)), (Completion(text, label),))


def module(count: int = 10, view: str = "binary", *, val: int | None = None, **options: Any) -> PreferenceDataModule:
    held = None if val is None else [record(n) for n in range(100, 100 + val)]
    made = PreferenceDataModule(Listed([record(n) for n in range(count)], held), **{"max_length": 200, **options})
    made.prepare(DataNeeds(view=view, flags=RowNeeds(mismatched=view == "binary")), tiny.word_tokenizer(tiny.CHATML))
    return made


def attach(made: PreferenceDataModule, *, accumulate: int = 1, world_size: int = 1, rank: int = 0) -> None:
    made.trainer = SimpleNamespace(accumulate_grad_batches=accumulate, world_size=world_size, global_rank=rank)  # type: ignore[assignment]


def ids(loader: Any) -> list[str]:
    return [name for batch in loader for name in batch.ids]


def test_examples_of_one_prompt_meet_in_a_step_where_that_is_asked_for() -> None:
    records = [record(n, prompt=f"hello {'world ' * (n // 4)}") for n in range(32)]

    def cut(grouped: bool) -> int:
        made = PreferenceDataModule(Listed(records), max_length=200, batch_size=8)
        made.prepare(DataNeeds(view="scored", flags=RowNeeds(grouped=grouped)), tiny.word_tokenizer(tiny.CHATML))
        attach(made)
        made.plan(epochs=2, max_steps=-1, accumulate=1, world_size=1)
        batches = list(made.train_dataloader())
        assert made.tokens_in(3) == sum(batch.total_tokens for batch in batches[:3])
        return sum(batch.step.groups.count(group) < 4 for batch in batches for group in batch.step.groups)

    assert cut(grouped=True) == 0
    assert cut(grouped=False) > 20


def test_turns_of_one_conversation_are_drawn_together() -> None:
    turns = [Message(("user", "assistant")[n % 2], "a") for n in range(7)]
    texts = ("a", "b", "c", "d", "hello", "world", "good", "bad")
    records = [
        Record(f"{text} {n}", (Message("user", text), *turns[1 : 2 * n + 1]), (Completion("b", n % 2 == 0),))
        for n in range(4)
        for text in texts
    ]
    made = PreferenceDataModule(Listed(records), max_length=200, batch_size=4, keep_together=4)
    made.prepare(DataNeeds(view="binary"), tiny.word_tokenizer(tiny.CHATML))
    attach(made)
    made.plan(epochs=1, max_steps=-1, accumulate=1, world_size=1)
    for batch in made.train_dataloader():
        assert len({name.partition(" ")[0] for name in batch.ids}) == 1
        # The longest of the four sequences has the others' prompts in it; "b" and the end of the turn follow each.
        (longest,) = {len(batch.packs[0].input_ids)}
        assert longest < 0.6 * batch.total_tokens


@pytest.mark.parametrize("whole", [True, False])
def test_completions_are_fed_whole_where_that_is_asked_for(whole: bool) -> None:
    made = PreferenceDataModule(Listed([record(n) for n in range(4)]), max_length=200, batch_size=4)
    made.prepare(DataNeeds(view="binary", flags=RowNeeds(last_hidden=whole)), tiny.word_tokenizer(tiny.CHATML))
    attach(made)
    made.plan(epochs=1, max_steps=-1, accumulate=1, world_size=1)
    (batch,) = made.train_dataloader()
    assert all((chunk.last is not None) == whole for chunk in batch.chunks)


# How many steps


@pytest.mark.parametrize(
    ("epochs", "max_steps", "batch_size", "accumulate", "world_size", "expected"),
    [
        (1, -1, 5, 1, 1, 2),
        (1, -1, 4, 1, 1, 3),  # the last step is filled from the next pass
        (1, -1, 1, 2, 3, 2),
        (1, -1, 64, 1, 1, 1),
        (2, -1, 4, 1, 1, 5),  # 20 examples: rounded up once, not once an epoch
        (3, -1, 4, 2, 1, 4),
        (1, 2, 4, 1, 1, 2),  # whichever comes first
        (1, 99, 4, 1, 1, 3),
        (None, 99, 4, 1, 1, 99),
    ],
)
def test_steps_are_counted_in_whole_steps_of_all_devices(
    epochs: int | None, max_steps: int, batch_size: int, accumulate: int, world_size: int, expected: int
) -> None:
    made = module(10, batch_size=batch_size)
    assert made.plan(epochs=epochs, max_steps=max_steps, accumulate=accumulate, world_size=world_size) == expected
    assert made.steps == expected


@pytest.mark.parametrize(("epochs", "max_steps"), [(None, -1), (0, -1), (1, 0), (-1, 5)])
def test_a_run_without_steps_is_refused(epochs: int | None, max_steps: int) -> None:
    with pytest.raises(ValueError, match=f"at least one step, found max_epochs={epochs}, max_steps={max_steps}"):
        module().plan(epochs=epochs, max_steps=max_steps, accumulate=1, world_size=1)


@pytest.mark.parametrize(("accumulate", "world_size"), [(1, 1), (3, 1), (1, 2), (2, 2)])
def test_tokens_are_those_of_the_batches_that_are_read(accumulate: int, world_size: int) -> None:
    made = module(7, batch_size=2)
    made.plan(epochs=3, max_steps=-1, accumulate=accumulate, world_size=world_size)
    rows = {row.id: sum(len(row.prompt + branch) for branch in row.branches) for row in made.rows["train"].table}
    for steps in (0, 1, made.steps):
        made._plan = replace(made._plan, steps=steps)
        read = 0
        for rank in range(world_size):
            attach(made, accumulate=accumulate, world_size=world_size, rank=rank)
            batches = list(made.train_dataloader())
            assert len(batches) == steps * accumulate
            read += sum(batch.total_tokens for batch in batches)
            assert sum(rows[name] for name in ids(batches)) == sum(batch.total_tokens for batch in batches)
        assert made.tokens_in(steps) == read


# Which examples


def test_at_most_so_many_examples_are_kept_the_same_ones_for_a_seed_and_in_their_order() -> None:
    def kept(**options: Any) -> list[str]:
        return [row.id for row in module(20, val=20, max_examples=6, **options).rows["train"].table]

    chosen = kept(seed=1)
    assert chosen == kept(seed=1) == sorted(chosen, key=lambda name: int(name[2:-2]))
    assert set(chosen) < {row.id for row in module(20).rows["train"].table}
    assert len(set(chosen)) == 6
    assert chosen != kept(seed=2)


def test_validation_has_a_limit_of_its_own() -> None:
    made = module(20, val=8, max_val_examples=3)
    assert (len(made.rows["train"]), len(made.rows["val"])) == (20, 3)
    assert len(module(20, val=8, max_examples=99).rows["train"]) == 20


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_held_out_examples_share_no_prompt_with_training(seed: int) -> None:
    records = [record(n, prompt=f"hello {'world ' * (n % 6)}") for n in range(24)]
    made = PreferenceDataModule(Listed(records), val_size=5, seed=seed)
    intake = made.preparation.read()
    made.preparation.derive(intake, DataNeeds(view="binary"))
    sides = {split: {prompt_key(e.prompt) for e in examples.views[0]} for split, examples in intake.examples.items()}
    assert not sides["train"] & sides["val"]
    assert len(sides["train"] | sides["val"]) == 6
    assert len(intake.examples["val"]) == 8  # whole prompts, each of four records
    assert intake.reports["val"]["records"] == 8
    assert intake.reports["train"]["records"] == 16


def test_a_sources_own_validation_data_are_used_whole() -> None:
    made = module(10, val=4, val_size=5)
    assert (len(made.rows["train"]), len(made.rows["val"])) == (10, 4)


def test_without_validation_data_there_is_nothing_to_validate() -> None:
    made = module(10)
    assert set(made.rows) == {"train"}
    assert made.val_dataloader() == []
    # In an order that the seed draws.
    in_order = [" ".join(["hello"] * n) for n in range(1, 11)]
    assert set(made.prepared.prompts) == set(in_order)
    assert len(made.prepared.prompts) == 10
    assert made.prepared.prompts != in_order
    assert module(10).prepared.prompts == made.prepared.prompts


def test_prompts_to_sample_from_are_held_out_and_different() -> None:
    val = [record(n, prompt=f"world {'b ' * (n // 2)}") for n in range(60)]
    made = PreferenceDataModule(Listed([record(n) for n in range(5)], val))
    prompts = made.prepare(DataNeeds(view="binary"), tiny.word_tokenizer(tiny.CHATML)).prompts
    assert len(prompts) == len(set(prompts))
    assert set(prompts) == {entry.prompt for entry in val}


def test_labels_are_counted_on_the_training_examples_that_are_kept() -> None:
    assert module(9, val=4).label_counts == (5, 4)
    assert sum(module(9, max_examples=4).label_counts or ()) == 4
    assert module(9, "demonstrations").label_counts is None


def test_the_report_counts_what_was_read_left_out_and_cut() -> None:
    made = module(6, "demonstrations", max_length=11, max_prompt_length=9)
    assert made.prepared.intake.reports["train"] == {
        "records": 6,
        "empty completion": 2,
        "undesirable completions left out": 3,
        "examples": 3,
        "prompts truncated": 1,
        "completions truncated": 1,
    }


def test_a_view_that_the_data_cannot_give_is_refused() -> None:
    made = PreferenceDataModule(Listed([record(n, desirable=True) for n in range(3)]))
    with pytest.raises(ValueError, match="no prompt has both"):
        made.prepare(DataNeeds(view="pairs"), tiny.word_tokenizer(tiny.CHATML))


def test_a_prompt_over_the_limit_is_named() -> None:
    with pytest.raises(ValueError, match=r"f:6#0: expected a prompt shorter than data\.max_length = 12"):
        module(10, max_length=12)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 0}, "data.batch_size: expected a whole number from 1 on, found 0"),
        ({"batch_size": 2.5}, "data.batch_size: expected a whole number from 1 on, found 2.5"),
        ({"max_examples": 0}, "data.max_examples"),
        ({"max_val_examples": -1}, "data.max_val_examples"),
        ({"val_size": -1}, "data.val_size: expected a whole number from 0 on"),
        ({"length_groups": 0}, "data.length_groups"),
        ({"workers": -1}, "data.workers"),
        ({"max_length": 1}, "data.max_length"),
        ({"max_prompt_length": 512}, "data.max_prompt_length"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PreferenceDataModule(Listed([record(0)]), **options)


# In which order


def stream(made: PreferenceDataModule, **trainer: int) -> list[str]:
    attach(made, **trainer)
    return ids(made.train_dataloader())


def test_every_pass_sees_each_example_once_in_another_order() -> None:
    made = module(10, batch_size=5)
    made.plan(epochs=2, max_steps=-1, accumulate=1, world_size=1)
    seen = stream(made)
    assert sorted(seen[:10]) == sorted(seen[10:]) == sorted({row.id for row in made.rows["train"].table})
    assert seen[:10] != seen[10:]
    assert stream(made) == seen
    other = module(10, batch_size=5, seed=1)
    other.plan(epochs=2, max_steps=-1, accumulate=1, world_size=1)
    assert stream(other) != seen


@pytest.mark.parametrize("length_groups", [1, 2, 9])
def test_sorting_by_length_leaves_batches_as_they_are(length_groups: int) -> None:
    made = module(10, batch_size=4, length_groups=length_groups)
    made.plan(epochs=2, max_steps=-1, accumulate=1, world_size=1)
    plain = module(10, batch_size=4)
    plain.plan(epochs=2, max_steps=-1, accumulate=1, world_size=1)
    assert stream(made) == stream(plain)
    assert all(len(batch.chunks) == 2 * min(length_groups, 4) for batch in made.train_dataloader())


@pytest.mark.parametrize(("options", "packs"), [({}, 2), ({"share_prompts": False}, 2), ({"packing": False}, 0)])
def test_batches_are_packed_unless_switched_off(options: dict[str, Any], packs: int) -> None:
    made = module(10, val=4, batch_size=4, **options)
    attach(made)
    made.plan(epochs=1, max_steps=-1, accumulate=1, world_size=1)
    batches = [*made.train_dataloader(), *made.val_dataloader()]
    assert {len(batch.packs) for batch in batches} == {packs}
    assert {part.continues for batch in batches for part in batch.packs[1:]} <= {options.get("share_prompts", True)}


def test_a_micro_batch_with_too_many_tokens_comes_in_parts() -> None:
    made = module(10, batch_size=4, max_tokens_per_batch=1)
    attach(made)
    made.plan(epochs=1, max_steps=-1, accumulate=1, world_size=1)
    for batch in made.train_dataloader():
        assert [part.needs_grad for part in batch.packs] == [True, False] * 4


def test_parts_need_packed_rows() -> None:
    with pytest.raises(ValueError, match=r"data\.max_tokens_per_batch: expected packed rows"):
        module(packing=False, max_tokens_per_batch=100)
    made = PreferenceDataModule(Listed([record(n) for n in range(4)]), max_length=200, max_tokens_per_batch=100)
    with pytest.raises(ValueError, match=r"data\.max_tokens_per_batch: expected a loss on completions' log-probs"):
        made.prepare(DataNeeds(view="binary", flags=RowNeeds(last_hidden=True)), tiny.word_tokenizer(tiny.CHATML))


def test_validation_serves_every_example_once_always_alike() -> None:
    made = module(4, val=9, batch_size=2)
    shares = []
    for rank in range(2):
        attach(made, world_size=2, rank=rank)
        loader = made.val_dataloader()
        assert ids(loader) == ids(loader)
        shares.append(ids(loader))
    assert sorted(shares[0] + shares[1]) == sorted(row.id for row in made.rows["val"].table)


def test_a_module_without_a_trainer_says_so() -> None:
    with pytest.raises(ValueError, match="attached to a Trainer"):
        module().train_dataloader()


# Where a resumed run goes on


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("served", [0, 1, 3, 5])
def test_a_loader_goes_on_behind_what_was_served(served: int, workers: int) -> None:
    made = module(10, batch_size=4, workers=workers)
    made.plan(epochs=2, max_steps=-1, accumulate=1, world_size=1)
    attach(made)
    whole = [batch.ids for batch in made.train_dataloader()]
    first = made.train_dataloader()
    for _, _batch in zip(range(served), first, strict=False):
        pass  # zip asks for no batch after the last
    state = first.state_dict()
    assert state == {"served": served}

    second = made.train_dataloader()
    second.load_state_dict(state)
    assert [batch.ids for batch in second] == whole[served:]
    assert second.state_dict() == {"served": len(whole)}
    assert len(first) == len(second) == len(whole) == math.ceil(2 * 10 / 4)


def test_a_loader_serves_batches_with_the_denominators_of_their_step() -> None:
    made = module(10, batch_size=2)
    made.plan(epochs=1, max_steps=-1, accumulate=2, world_size=1)
    attach(made, accumulate=2)
    loader = made.train_dataloader()
    assert isinstance(loader, ResumableLoader)
    assert isinstance(loader.dataset, Batches)
    batches = list(loader)
    for one, other in zip(batches[::2], batches[1::2], strict=True):
        assert one.step == other.step
        assert one.step.examples == 4
        assert one.step.tokens[0] == int(one.mask[:, 0].sum() + other.mask[:, 0].sum())
    assert all(torch.equal(batch.mask.any(-1), torch.ones(2, 2, dtype=torch.bool)) for batch in batches)


def test_fewer_validation_examples_than_devices_are_refused_when_steps_are_planned() -> None:
    made = module(10, batch_size=2, val=3)
    made.plan(epochs=1, max_steps=-1, accumulate=1, world_size=3)
    with pytest.raises(ValueError, match="expected one example for each of 4 devices, found 3"):
        made.plan(epochs=1, max_steps=-1, accumulate=1, world_size=4)


def test_the_longest_sequence_is_known() -> None:
    made = module(10, val=5)
    rows = [row for split in made.rows.values() for row in split.table]
    assert made.prepared.longest() == max(len(row.prompt) + len(branch) for row in rows for branch in row.branches)


@pytest.mark.parametrize(("max_steps", "told"), [(-1, False), (5, False), (6, True)])
def test_steps_that_the_epochs_do_not_have_are_told(
    max_steps: int, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    assert module(10, batch_size=2).plan(epochs=1, max_steps=max_steps, accumulate=1, world_size=1) == 5
    assert ("trainer.max_steps=6: the run has 5 steps, as trainer.max_epochs=1" in caplog.text) == told


def test_batches_are_copied_to_a_gpu_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    made = module(4, batch_size=4)
    made.plan(epochs=1, max_steps=-1, accumulate=1, world_size=1)
    attach(made)
    (batch,) = made.train_dataloader()
    assert made.transfer_batch_to_device(batch, torch.device("cpu"), 0).ids == batch.ids
    asked: list[Any] = []
    monkeypatch.setattr(Batch, "to", lambda self, device, non_blocking=False: asked.append((device, non_blocking)))
    made.transfer_batch_to_device(batch, torch.device("cuda", 1), 0)
    assert asked == [(torch.device("cuda", 1), True)]
