"""Judged samples to train on, held out against the data that their prompts came from."""

from pathlib import Path

from halos.data.records.split import split_by_prompt
from halos.data.sources.feedback_files import FeedbackFiles
from halos.data.sources.on_policy import OnPolicySource
from halos.toy.source import ToySource

ROW = '{{"prompt": "p{0}", "completions": [{{"text": "a{0}", "desirable": true}}]}}\n'


def test_training_records_are_the_feedback_and_the_rest_is_the_worlds(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_text(ROW.format(0))
    world = ToySource(size=3, val_size=2)
    source = OnPolicySource(feedback=tmp_path / "f.jsonl", world=world, val_size=1)
    assert [record.prompt for record in source.train().records] == ["p0"]
    held = source.val()
    assert held is not None
    assert held.records == world.val().records
    assert isinstance(source.true_reward(), type(world.true_reward()))


def test_what_was_held_out_of_the_worlds_training_data_stays_held_out(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_text(ROW.format(99))
    (tmp_path / "w.jsonl").write_text("".join(map(ROW.format, range(8))) + '{"prompt": "p", "completion": ""}\n')
    world = FeedbackFiles(tmp_path / "w.jsonl")
    held = OnPolicySource(feedback=tmp_path / "f.jsonl", world=world, val_size=3, seed=5).val()
    assert held is not None
    assert held.records == split_by_prompt(world.train().records, 3, 5)[1]
    assert len(held.records) == 3
    assert (world.train().dropped.total(), held.dropped.total()) == (1, 0), (
        "what training data left out is no count of val"
    )
    assert OnPolicySource(feedback=tmp_path / "f.jsonl", world=world).val() is None
