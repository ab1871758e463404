"""Read meta.json of the newest checkpoint: settings, history and position, without torch."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from orchestrator.settings.errors import UserError
from orchestrator.settings.load import make_spec
from orchestrator.settings.run import RunSpec
from orchestrator.training.lossless_json import decode
from orchestrator.training.manifest import committed, differing, listed_in

META = "meta.json"


def newest_meta(checkpoints: Path) -> dict[str, Any]:
    """Return meta.json of the newest checkpoint that has an intact one; empty if none has.

    Raises:
        ReadFailed: the folder of checkpoints cannot be listed at the moment.
    """
    for folder in committed(checkpoints):
        # of another format, or unreadable at the moment: `choose_checkpoint` reports it
        with suppress(UserError, OSError):
            listed = listed_in(folder)
            if listed is None or META not in listed.files:
                continue
            if not differing(folder, {META: listed.files[META]}):
                return decode(json.loads((folder / META).read_text()))
    return {}


def settings_in(meta: dict[str, Any]) -> RunSpec | None:
    """Return the settings in a meta.json; None if it has none, or this version cannot read them."""
    with suppress(UserError):
        return make_spec(meta["spec"]) if "spec" in meta else None
    return None
