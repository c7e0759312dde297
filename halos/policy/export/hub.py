"""Pushes an exported model to the Hugging Face hub. huggingface_hub finds the token by itself."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from halos.processes.errors import RunFailed


def check_push(name: object) -> None:
    """Check before a run that its model can be pushed, without contacting the hub.

    Args:
        name: the repository, ``owner/name``; None for no push.

    Raises:
        ValueError: the name has another form, there is no token, or huggingface_hub is offline.
    """
    if name is None:
        return
    try:
        validate_repo_id(str(name))
        well_formed = isinstance(name, str) and "/" in name
    except HFValidationError:
        well_formed = False
    if not well_formed:
        raise ValueError(f"hub.push: expected owner/name, such as mylab/zephyr-kto, found {name!r}")
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"hub.push: expected null with HF_HUB_OFFLINE=1, found {name}; unset it to push")
    if huggingface_hub.get_token() is None:
        raise ValueError(f"hub.push: expected a token of the hub to push {name}, found none; run hf auth login")


def push(folder: Path, name: str, *, private: bool) -> str:
    """Push all files of a folder, and return the address of the repository. A missing repository is made.

    Args:
        folder: an exported model.
        name: the repository, ``owner/name``.
        private: whether a new repository is private.

    Raises:
        RunFailed: the hub could not be reached or has refused it; the folder is as it was.
    """
    api = huggingface_hub.HfApi()
    try:
        repository = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Model trained with halos")
    except Exception as error:  # of the hub, of HTTP or of the network: several kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        hint = f"the run is complete: push its model with hf upload {name} {folder}"
        raise RunFailed(f"hub.push: {name} was not written: {reason}; {hint}") from error
    return str(repository)
