"""The verified export sent to the hub, once, after training: exactly the folder `model/`.

transformers would send the run folder, with optimizer states, held-out prompts and its arguments;
its own switch is off (`TrainArguments`). The tests have no network: what the hub itself does with
the two calls made here is not proved by them.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from qwen3_sft.errors import UploadError, UsageError
from qwen3_sft.options.combinations import hub_name
from qwen3_sft.options.train_args import TrainArguments
from qwen3_sft.records.secret_options import MASK

logger = logging.getLogger(__name__)


def check_token(train: TrainArguments) -> None:
    """Find out before training whether an upload has a token.

    Raises:
        UsageError: an upload is asked for and there is none.
    """
    from huggingface_hub import get_token

    if train.push_to_hub and not (train.hub_token or get_token()):
        raise UsageError("--push_to_hub true: no token of the hub; set HF_TOKEN, or log in")


def upload_model(train: TrainArguments, folder: Path, api: Any = None) -> None:
    """Send a folder to the hub.

    Args:
        train: options; without `hub_private_repo false` the repository is private.
        folder: a verified export.
        api: `huggingface_hub.HfApi`, or something with its three functions that are called.

    Raises:
        UploadError: with the folder and the command that sends it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # Of the HTTP library below the hub's client, which is another one in other versions.
    failures: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, OSError, HFValidationError)
    api = HfApi(token=train.hub_token) if api is None else api
    is_private = train.hub_private_repo is not False
    name = hub_name(train)
    try:
        name = api.create_repo(name, private=is_private, exist_ok=True).repo_id
        if is_private and not api.model_info(name).private:  # it was there before, and stays so
            raise UploadError(_failed(train, folder, "it is public; --hub_private_repo false"))
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload model")
    except failures as error:
        raise UploadError(_failed(train, folder, f"{type(error).__name__}: {error}")) from None
    logger.info("uploaded %s to %s (%s)", folder, name, "private" if is_private else "public")


def _failed(train: TrainArguments, folder: Path, reason: str) -> str:
    if train.hub_token:
        reason = reason.replace(train.hub_token, MASK)
    private = "" if train.hub_private_repo is False else " --private"
    return (
        f"{hub_name(train)} was not uploaded ({reason}); the run is finished, its verified model "
        f"is {folder}: hf upload {hub_name(train)} {folder}{private}"
    )
