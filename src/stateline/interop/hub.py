"""Models by their name on the Hugging Face Hub: fetched once, by its own library, which keeps and renews them."""

from __future__ import annotations

import re
from pathlib import Path

from stateline.models.checkpoint import CheckpointError

#: organisation/model[@revision], as the Hub allows them.
NAME = re.compile(r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
#: What a model is read from; other files stay on the Hub.
WANTED = ["*.json", "*.safetensors", "*.bin", "*.txt", "*.model"]


def is_name(text: str) -> bool:
    """Whether a text could name a model on the Hub: organisation/model, perhaps with @revision."""
    return NAME.fullmatch(text) is not None


def fetch(name: str) -> Path:
    """The directory that holds a model of the Hub, downloaded if it is not here yet.

    name: organisation/model or organisation/model@revision. Where files are kept, the token for private models, working
    offline: HF_HOME, HF_TOKEN, HF_HUB_OFFLINE and whatever else huggingface_hub goes by.

    Raises CheckpointError naming what is missing: the package, the model, or the network.
    """
    found = NAME.fullmatch(name)
    if found is None:
        raise CheckpointError(f"{name!r} is no name of a model, expected organisation/model.")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as error:
        raise CheckpointError(
            f"{name} is no directory here. If it is a model on the Hugging Face Hub: pip install 'stateline[hf]'"
        ) from error
    repo, revision = found["repo"], found["revision"]
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=WANTED))
    except GatedRepoError as error:  # before its parent, RepositoryNotFoundError
        raise CheckpointError(
            f"{repo} is given only to those whom its owners let in. Ask on its page, then log in: hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{repo} has no revision {revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repo} is no directory here, and no model on the Hub that you may read. Is the name right? For a private"
            " one: hf auth login"
        ) from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{repo} is no directory here, the Hub cannot be reached, and it was not fetched before. Fetch it where"
            f" there is a network, `hf download {repo} --local-dir DIR`, and load DIR."
        ) from error
