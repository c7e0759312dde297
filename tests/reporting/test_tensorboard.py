"""What TensorBoard finds in a run's folder."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from torch.utils.tensorboard import SummaryWriter

from halos.reporting.board_report import LAYOUT
from halos.reporting.tensorboard import truncate_events_after
from tests.train_runs import run

pytestmark = pytest.mark.runs

STEPS = 2


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> EventAccumulator:
    folder = tmp_path_factory.mktemp("tensorboard") / "run"
    shown = ["logger=tensorboard", "sampling.prompts=2", "sampling.size=4", "trainer.val_check_interval=1"]
    shown += ["sampling.kl=true", "sampling.validations=9"]
    run(folder, *shown, f"trainer.max_steps={STEPS}", "loss.beta=0.25")
    accumulator = EventAccumulator(str(folder / "tensorboard"), size_guidance={"histograms": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


@pytest.mark.parametrize(
    ("name", "first"), [("train/loss", 1), ("train/lr", 1), ("val/loss", 0), ("val/z0/raw", 0), ("val/kl", 0)]
)
def test_scalars_stand_at_their_optimizer_steps(name: str, first: int, events: EventAccumulator) -> None:
    assert [event.step for event in events.Scalars(name)] == list(range(first, STEPS + 1))


def test_rewards_and_kl_come_first(events: EventAccumulator) -> None:
    tags = sorted(events.Tags()["scalars"])
    first = {tag for tag in tags if tag.startswith("alignment/")}
    assert first == set(tags[: len(first)])
    samples = ("samples/length", "samples/truncated", "samples/win_rate")
    names = ("kl", "rewards/margins", "rewards/chosen", "rewards/rejected", "rewards/auc", *samples)
    assert first == {f"alignment/{name}" for name in names}
    for name in names:
        copies, originals = events.Scalars(f"alignment/{name}"), events.Scalars(f"val/{name}")
        assert [(event.step, event.value) for event in copies] == [(event.step, event.value) for event in originals]


def test_rewards_and_kl_share_charts(events: EventAccumulator) -> None:
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == [*LAYOUT]
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    expected = {title: tags for chart in LAYOUT.values() for title, tags in chart.items()}
    logged = events.Tags()["scalars"]
    drawn = {
        title: [tag for tag in logged if any(re.search(one, tag) for one in patterns)]
        for title, patterns in charts.items()
    }
    assert {title: sorted(tags) for title, tags in drawn.items()} == {k: sorted(v) for k, v in expected.items()}


def test_rewards_of_both_kinds_are_histograms_at_every_validation(events: EventAccumulator) -> None:
    counted: list[Any] = []
    for kind, side in (("desirable", "chosen"), ("undesirable", "rejected")):
        found = events.Histograms(f"val/rewards/{kind}")
        assert [event.step for event in found] == list(range(STEPS + 1))
        counts = {event.histogram_value.num for event in found}
        assert len(counts) == 1
        counted += counts
        assert -1e-5 < found[0].histogram_value.min <= found[0].histogram_value.max < 1e-5
        last = found[-1].histogram_value
        assert last.sum / last.num == pytest.approx(events.Scalars(f"val/rewards/{side}")[-1].value, rel=1e-4) != 0
    assert sum(counted) == 8


def test_replies_before_and_after_are_a_table_at_every_validation(events: EventAccumulator) -> None:
    found = events.Tensors("samples/text_summary")
    assert [event.step for event in found] == list(range(STEPS + 1))
    tables = [event.tensor_proto.string_val[0].decode().split("\n") for event in found]
    rows = [[line.strip("| ").split(" | ") for line in lines] for lines in tables]
    for table in rows:
        assert table[0] == ["prompt", "before: the reference's reply", "after: the policy's reply"]
        assert [len(row) for row in table] == [3] * 4
        assert all("&lt;\\|assistant\\|&gt;" in row[0] for row in table[2:])
    # At step 0 both models are the same and draw the same; the reference's replies stay.
    assert all(row[1] == row[2] for row in rows[0][2:])
    assert [row[:2] for row in rows[0]] == [row[:2] for row in rows[-1]]


def test_the_win_rate_starts_at_one_half(events: EventAccumulator) -> None:
    first, *others = [event.value for event in events.Scalars("val/samples/win_rate")]
    assert first == 0.5
    assert all(0 <= value <= 1 for value in others)


def test_parameters_stand_beside_final_metrics(events: EventAccumulator) -> None:
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    params = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert params["loss.beta"].number_value == 0.25
    assert params["loss.name"].string_value == "kto"
    assert {"optim.lr", "data.batch_size", "model.path", "precision", "seed", "strategy"} <= set(params)
    content = events.summary_metadata["_hparams_/experiment"].plugin_data.content
    infos = plugin_data_pb2.HParamsPluginData.FromString(content).experiment.metric_infos
    columns = [info.name.tag for info in infos]
    assert columns[:2] == ["val/kl", "val/rewards/margins"]
    assert set(columns) <= set(events.Tags()["scalars"])
    assert {"val/loss", "val/kl", "val/final/samples/policy_desirable", "val/final/samples/kl"} <= set(columns)
    # What a curve has is no single point too.
    final = {name: events.Scalars(name) for name in events.Tags()["scalars"] if name.startswith("val/final/")}
    assert all(name.startswith("val/final/samples/") for name in final)
    assert all([event.step for event in points] == [STEPS] for points in final.values())


def test_a_run_without_tensorboard_leaves_none(tmp_path: Path) -> None:
    run(tmp_path, "trainer.max_steps=1", "sampling.prompts=1")
    assert not (tmp_path / "tensorboard").exists()
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 1


@pytest.mark.parametrize(("validated", "last"), [(True, 2), (False, 1)])
def test_a_resumed_run_forgets_what_it_will_log_again(validated: bool, last: int, tmp_path: Path) -> None:
    writer = SummaryWriter(str(tmp_path))
    for step in range(4):
        writer.add_scalar("train/loss", 0.5, step)
        writer.add_scalar("val/loss", 0.5, step)
        writer.add_scalar("alignment/kl", 0.5, step)
        writer.add_scalar("alignment/train/rewards/chosen", 0.5, step)
    writer.add_scalar("val/final/loss", 0.5, 0)
    writer.close()
    (file,) = tmp_path.glob("events*")
    file.with_name(f"{file.name}.part").write_bytes(file.read_bytes())  # a kill while an earlier resume rewrote it
    truncate_events_after(tmp_path, 2, validated=validated)
    file.write_bytes(file.read_bytes() + b"cut off")
    found = EventAccumulator(str(tmp_path), purge_orphaned_data=False)
    found.Reload()
    for name in ("train/loss", "alignment/train/rewards/chosen"):
        assert [event.step for event in found.Scalars(name)] == [0, 1, 2]
    for name in ("val/loss", "alignment/kl"):
        assert [event.step for event in found.Scalars(name)] == list(range(last + 1))
    assert "val/final/loss" not in found.Tags()["scalars"]
    assert list(tmp_path.iterdir()) == [file]
