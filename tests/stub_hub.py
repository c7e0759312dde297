"""The Hugging Face hub without a network: records what is pushed, and fails where it is told to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

TOKEN = "hf_secretSecretSecret"


class Hub:
    """Takes the place of ``HfApi`` until the end of a test; ``failing`` names the call that fails."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.failing: str | None = None
        patch.setattr(huggingface_hub, "HfApi", lambda: self)
        patch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        assert exist_ok
        self._note("create_repo", repo_id, private)
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        assert commit_message
        self._note("upload_folder", repo_id, sorted(file.name for file in folder_path.iterdir()))

    def _note(self, *call: Any) -> None:
        if call[0] == self.failing:
            raise OSError("403 Forbidden:\nyou are not allowed to")
        self.calls.append(call)
