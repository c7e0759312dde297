"""Pushing a model to the hub: what is checked before the run, and what is left when the hub fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from halos.policy.export.hub import check_push, push
from halos.processes.errors import RunFailed
from tests.stub_hub import Hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(monkeypatch)


def test_a_name_with_an_owner_and_a_token_are_enough(hub: Hub) -> None:
    check_push(None)
    check_push("my-lab/zephyr_kto.2")
    assert hub.calls == []


@pytest.mark.parametrize("name", ["kto", "a/b/c", "a b/c", "-a/b", "a/b.git", "../b", "", True, ["a/b"]])
def test_other_names_are_refused(name: Any, hub: Hub) -> None:
    with pytest.raises(ValueError, match=r"^hub\.push: expected owner/name, such as mylab/zephyr-kto, found"):
        check_push(name)


def test_a_missing_token_and_an_offline_hub_are_found_before_the_run(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match=r"^hub\.push: expected a token of the hub to push a/b, found none; run"):
        check_push("a/b")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"^hub\.push: expected null with HF_HUB_OFFLINE=1, found a/b; unset it"):
        check_push("a/b")


@pytest.mark.parametrize("private", [True, False])
def test_all_files_of_the_folder_are_pushed(private: bool, hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("card")
    assert push(tmp_path, "a/b", private=private) == "https://huggingface.co/a/b"
    assert hub.calls == [("create_repo", "a/b", private), ("upload_folder", "a/b", ["README.md"])]


@pytest.mark.parametrize("failing", ["create_repo", "upload_folder"])
def test_a_failure_names_the_command_to_push_by_hand_and_no_token(failing: str, hub: Hub, tmp_path: Path) -> None:
    hub.failing = failing
    with pytest.raises(RunFailed) as caught:
        push(tmp_path, "a/b", private=True)
    assert str(caught.value) == (
        "hub.push: a/b was not written: 403 Forbidden: you are not allowed to; "
        f"the run is complete: push its model with hf upload a/b {tmp_path}"
    )
