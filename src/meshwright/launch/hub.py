"""Models by their name on the Hugging Face hub, fetched before a rank starts. Needs the package huggingface_hub."""

import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from meshwright.spec import SettingError

# Numbers, weights and what belongs to the tokenizer; no pickles, and no code.
WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
# The same weights in another tool's files, which some models have besides.
UNWANTED = ["*/*", "consolidated*"]


def find_model(name: str, *, download: bool) -> Path:
    """The folder with a hub model's files, downloaded unless they are there already.

    download: False takes only what an earlier download left, so that the ranks of a host do not all fetch it.
    """
    setting, local = f'model.path = "{name}"', "the path of a folder with config.json and model.safetensors"
    if find_spec("huggingface_hub") is None:
        raise SettingError(setting, "is no folder, and huggingface_hub, which would fetch it, is not installed", local)
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise SettingError(setting, "is no folder, and no name of the hub's", local)
    # By name, because it is not among this package's own requirements.
    hub: Any = import_module("huggingface_hub")
    try:
        return Path(
            hub.snapshot_download(name, allow_patterns=WANTED, ignore_patterns=UNWANTED, local_files_only=not download)
        )
    except Exception as error:  # the network libraries below it raise errors of their own, with no common kind
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        tried = "could not be fetched from the hub" if download else "is not in the hub's local cache"
        nearest = local if download else f"hf download {name} on every host first"
        raise SettingError(setting, f"is no folder, and {tried} ({reason})", nearest) from None
