"""Sharded checkpoints of strangers: nothing in them runs, and what is no tensor or plain value is refused by name."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_saver import save

from halos.sharding.consolidate import consolidate
from halos.sharding.reading import check_sharded, load_entries, read_entries, read_index
from halos.training.checkpoint_files import newest


class Command:
    """Runs a shell command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


class Bytes(Command):
    """The same through a function of an innocent module, which unpickles the bytes that it gets."""

    def __reduce__(self) -> Any:
        stored = pickle.dumps(Command(self.marker))
        return torch.storage._load_from_bytes, (legacy(stored),)


def legacy(stored: bytes) -> bytes:
    # The first three pickles of torch's old format are checks, then come the object and the keys of its storages.
    numbers = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})
    return b"".join(pickle.dumps(number, protocol=2) for number in numbers) + stored + pickle.dumps([])


def sharded(folder: Path, value: object = 0.5) -> Path:
    group = {"lr": value, "betas": (0.9, 0.999), "params": ["weight"]}
    moments = {"weight": {"exp_avg": torch.arange(6.0).reshape(2, 3), "step": torch.tensor(3.0)}}
    state = {
        "state_dict": {"weight": torch.ones(2, 3, dtype=torch.bfloat16)},
        "optimizer_0": {"state": moments, "param_groups": [group]},
    }
    folder.mkdir(parents=True)
    save(state, storage_writer=FileSystemWriter(folder), no_dist=True)
    torch.save({"global_step": 3}, folder / "meta.pt")
    return folder


def rewrite(folder: Path, index: object) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def index_of(folder: Path) -> Metadata:
    index: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    return index


def test_tensors_and_plain_values_are_read_as_they_were_written(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "step_3.ckpt")
    state = read_entries(check_sharded(folder))
    assert state["optimizer_0"]["param_groups"] == [{"lr": 0.5, "betas": (0.9, 0.999), "params": ["weight"]}]
    torch.testing.assert_close(state["optimizer_0"]["state"]["weight"]["exp_avg"], torch.arange(6.0).reshape(2, 3))
    weights = read_entries(folder, {"state_dict"})
    assert weights.keys() == {"state_dict"}
    torch.testing.assert_close(weights["state_dict"]["weight"], torch.ones(2, 3, dtype=torch.bfloat16))
    consolidate(folder, tmp_path / "whole.ckpt")
    whole = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    assert whole["optimizer_states"][0]["param_groups"][0]["params"] == [0]
    assert whole["global_step"] == 3


def test_a_state_is_loaded_in_place(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "step_3.ckpt")
    state = {"state_dict": {"weight": torch.zeros(2, 3, dtype=torch.bfloat16)}}
    load_entries(state, folder)
    assert state["state_dict"]["weight"].eq(1).all()


@pytest.mark.parametrize("payload", [Command, Bytes])
def test_an_entry_that_would_run_a_command_is_refused_by_name(payload: Any, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    folder = sharded(tmp_path / "step_3.ckpt", payload(marker))
    refused = r"optimizer_0\.param_groups\.0\.lr: expected a tensor or plain values"
    with pytest.raises(ValueError, match=refused):
        consolidate(folder, tmp_path / "whole.ckpt")
    state = {"optimizer_0": {"param_groups": [{"lr": 1.0}]}}
    with pytest.raises(ValueError, match=refused):
        load_entries(state, folder)
    assert not marker.exists()


@pytest.mark.parametrize("payload", [Command, Bytes])
def test_an_index_that_would_run_a_command_is_refused_by_name(payload: Any, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    folder = sharded(tmp_path / "step_3.ckpt")
    index = index_of(folder)
    index.planner_data = payload(marker)
    rewrite(folder, index)
    with pytest.raises(ValueError, match=r"unexpected (posix\.system|torch\.storage\._load_from_bytes)"):
        consolidate(folder, tmp_path / "whole.ckpt")
    with pytest.raises(ValueError, match="unexpected"):
        newest(tmp_path)  # what resume=auto reads
    with pytest.raises(ValueError, match="unexpected"):
        load_entries({}, folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch.storage", "_load_from_bytes"),
        ("torch.serialization", "load"),
        ("torch.serialization", "os.system"),
        ("torch", "load"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch.distributed.checkpoint.filesystem", "FileSystemReader"),
        ("torch.distributed.checkpoint.filesystem", "pickle.loads"),
        ("builtins", "getattr"),
    ],
)
def test_an_index_names_nothing_but_what_describes_tensors(module: str, name: str, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "step_3.ckpt")
    named = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)) + b"\x93."
    (folder / ".metadata").write_bytes(named)
    with pytest.raises(ValueError, match="unexpected"):
        check_sharded(folder)


def test_an_index_that_the_folder_cannot_hold_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "step_3.ckpt")
    good = index_of(folder)
    weight = good.state_dict_metadata["state_dict.weight"]
    large = {**good.state_dict_metadata, "state_dict.weight": pickle.loads(pickle.dumps(weight))}
    large["state_dict.weight"].size = torch.Size([2**40, 3])
    outside = {place: pickle.loads(pickle.dumps(info)) for place, info in good.storage_data.items()}
    next(iter(outside.values())).relative_path = "../other"
    long = {**good.planner_data, "state_dict.weight": ("state_dict", 10**9)}
    changes: list[tuple[dict[str, object], str]] = [
        ({"state_dict_metadata": large}, "expected tensors of up to"),
        ({"state_dict_metadata": {"state_dict.weight": 3}}, "expected a tensor or bytes"),
        ({"planner_data": long}, "small numbers as its path"),
        ({"storage_data": outside}, "expected a file of the folder"),
        ({"storage_data": {1: 2}}, "expected places in files"),
    ]
    for change, message in changes:
        rewrite(folder, Metadata(**{**vars(good), **change}))
        with pytest.raises(ValueError, match=message):
            read_index(folder)
    rewrite(folder, {"a": 1})
    with pytest.raises(ValueError, match="expected PyTorch's Metadata, found dict"):
        read_index(folder)


@pytest.mark.parametrize("put", [b"r\xff\xff\xff\xff", b"p2147483648\n"])
def test_an_index_that_numbers_an_object_in_the_billions_is_refused_before_it_is_read(
    put: bytes, tmp_path: Path
) -> None:
    folder = sharded(tmp_path / "step_3.ckpt")
    (folder / ".metadata").write_bytes(b"\x80\x02}" + put + b".")  # a dict, kept under the number
    with pytest.raises(ValueError, match=r"expected at most \d+ objects, as it has bytes, found the number [24],"):
        read_index(folder)


def test_a_folder_with_a_cut_file_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "step_3.ckpt")
    (shards,) = folder.glob("*.distcp")
    shards.write_bytes(shards.read_bytes()[:3000])
    with pytest.raises(ValueError, match="step_3"):
        read_entries(folder)


def test_a_checkpoint_file_that_would_run_a_command_is_refused(tmp_path: Path) -> None:
    from halos.training.checkpoint_files import check_identity

    marker = tmp_path / "ran"
    torch.save({"halos": {}, "payload": Command(marker)}, tmp_path / "step_3.ckpt")
    with pytest.raises(ValueError, match="expected a checkpoint of this program"):
        check_identity(tmp_path / "step_3.ckpt", {})
    assert not marker.exists()
