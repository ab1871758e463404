"""Find hub names in the settings that this machine can neither read from its cache nor download."""

import os
import socket
from urllib.parse import urlsplit

from orchestrator.settings.load import DATA_KEYS, MODEL_KEYS, looks_local, paths_in
from orchestrator.settings.run import RunSpec

CACHED_FILES = ("config.json", "tokenizer_config.json", "adapter_config.json")
TIMEOUT_S = 3.0  # the hub's client tries for 46 s per name


def unreachable_models(spec: RunSpec) -> dict[str, str]:
    """Return the hub names of models and tokenizers that cannot be loaded here, by setting.

    They are not cached, and the hub does not answer.

    With HF_HUB_OFFLINE there are none: a run started here would not contact the hub either.
    """
    names = {key: name for key, name in paths_in(spec, MODEL_KEYS).items() if not looks_local(name)}
    names = {key: name for key, name in names.items() if not _is_cached(name)}
    return {} if not names or is_offline() or hub_answers() else names


def unread_sources(spec: RunSpec) -> dict[str, str]:
    """Return the hub names of data sets, by setting: their rows are read only where the run starts.

    With HF_HUB_OFFLINE there are none: nothing would be downloaded, so they can be read here.
    """
    sources = paths_in(spec, DATA_KEYS).items()
    return {} if is_offline() else {key: name for key, name in sources if not looks_local(name)}


def is_offline() -> bool:
    """Return whether HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _is_cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return any(isinstance(try_to_load_from_cache(name, file), str) for file in CACHED_FILES)
    except HFValidationError:
        return True  # not a hub name; loading it raises the error


def hub_answers() -> bool:
    """Return whether the hub's host accepts connections; with a proxy, assume so."""
    from huggingface_hub import constants

    if any(
        os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
    ):
        return True
    url = urlsplit(constants.ENDPOINT)
    try:
        with socket.create_connection((url.hostname or "", url.port or 443), timeout=TIMEOUT_S):
            return True
    except OSError:
        return False
