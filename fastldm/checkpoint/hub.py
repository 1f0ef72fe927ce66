"""Where the model that the user names is: a local path, the shipped model, or a Hub repository."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fastldm.checkpoint.source import CONDITIONERS, PARTS
from fastldm.errors import CheckpointError, InvalidArgument

DEFAULT = Path(__file__).parents[1] / "assets" / "default"
ALLOWED = "a diffusers folder, a single file, 'default', or a Hub id such as 'owner/name'"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]{0,95}/[A-Za-z0-9][\w.\-]{0,95}")
_MODEL_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".json", ".zip", ".gguf")

NETWORKS = sorted({*PARTS, *CONDITIONERS})
WANTED = [
    "model_index.json",
    "*/*.json",
    "tokenizer/*.txt",
    *(f"{part}/*model*.safetensors" for part in NETWORKS),
]
PICKLES = [f"{part}/*model*.bin" for part in NETWORKS]
UNWANTED = ["safety_checker/*", "*non_ema*", "*.bf16*"]
HALF = "*.fp16*"


def resolve(path: str | os.PathLike[str], allow_pickle: bool = False) -> Path:
    """The local folder or file that `path` means; no socket is opened for a path that exists.

    InvalidArgument for no path at all; CheckpointError for one that leads nowhere and is no Hub id either.
    """
    name = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(name, str) or not name or "\0" in name:
        raise InvalidArgument("path", path, ALLOWED)
    if name == "default":
        return DEFAULT
    try:
        place = Path(name).expanduser()
        if place.exists():
            return place
    except (OSError, RuntimeError):
        raise InvalidArgument("path", path, ALLOWED) from None
    is_hub_id = isinstance(path, str) and _HUB_ID.fullmatch(name) and not name.endswith(_MODEL_FILES)
    if not is_hub_id or place.parent.is_dir():
        raise CheckpointError(name, None, f"there is no such file or folder; allowed is {ALLOWED}")
    return download(name, allow_pickle)


def download(repository: str, allow_pickle: bool = False) -> Path:
    """The folder of a Hub repository's files that fastldm reads, from the cache or the network.

    HF_HUB_OFFLINE, HF_HOME and tokens are huggingface_hub's business. Without plain weights the fp16 variant
    is taken, and without that one pickles where they are allowed.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        why = "there is no such file or folder, and Hub ids need huggingface_hub: pip install huggingface_hub"
        raise CheckpointError(repository, None, why) from error
    choices = [(WANTED, [*UNWANTED, HALF]), (WANTED, UNWANTED)]
    if allow_pickle:
        choices.append((WANTED + PICKLES, [*UNWANTED, HALF]))
    try:
        for wanted, unwanted in choices:
            folder = Path(snapshot_download(repository, allow_patterns=wanted, ignore_patterns=unwanted))
            parts = [folder / part for part in NETWORKS if (folder / part).is_dir()]
            if all(any(part.glob("*.safetensors")) for part in parts):
                break
    except Exception as error:  # the Hub's client raises its own errors, its HTTP library's and OSError
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        why = f"there is no such file or folder, nor can it be had from the Hub: {reason:.300}"
        raise CheckpointError(repository, None, why) from error
    return folder
