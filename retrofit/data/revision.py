"""Which commit of a hub dataset is read: the name stands for another text when its owner changes it."""

from __future__ import annotations

import functools
from pathlib import Path

_SECONDS = 20.0


@functools.cache
def commit_of(dataset: str) -> str | None:
    """The commit that a dataset of the hub is at, of the main branch; None where neither hub nor cache says it.

    Asked once, so that all that this process reads of a dataset is of one commit. Without an answer from the hub it is
    the commit that the local cache holds.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import HFValidationError, HTTPError

    if not is_offline_mode():
        try:
            return HfApi().dataset_info(dataset, timeout=_SECONDS).sha
        except HFValidationError:
            return None
        except (HTTPError, OSError):  # what is wrong with the dataset is reported when it is read
            pass
    return _cached(dataset)


def _cached(dataset: str) -> str | None:
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    name = repo_folder_name(repo_id=dataset, repo_type="dataset")
    try:
        return (Path(HF_HUB_CACHE) / name / "refs" / "main").read_text(encoding="ascii").strip() or None
    except (OSError, UnicodeDecodeError):
        return None
