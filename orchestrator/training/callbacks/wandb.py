"""Log metrics and settings to Weights & Biases, online if there is a key, else offline; steps never
wait for it.
"""

import logging
import os
import re
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

from orchestrator.callback_api import TrainerCallback
from orchestrator.durable import write_atomically
from orchestrator.settings.errors import UserError
from orchestrator.settings.plain import SECRET_NAME
from orchestrator.settings.run import RunSpec
from orchestrator.training.rundir import RunDir

logger = logging.getLogger(__name__)

# longest wait for W&B at the start; then the run is recorded offline, which takes another second
INIT_TIMEOUT_S = 3
FINISH_TIMEOUT_S = (
    120  # longest wait at the end; data not sent stay in RUN_DIR/wandb for `wandb sync`
)


class WandbCallback(TrainerCallback):
    """One W&B run across resumes (online; offline, each process writes its own folder with the same
    id).
    """

    def __init__(self, spec: RunSpec, run_dir: RunDir) -> None:
        self.spec, self.run_dir = spec, run_dir
        self.run: Any = None
        if spec.wandb.key_file:
            # wandb.login would write it to ~/.netrc
            os.environ["WANDB_API_KEY"] = _read_key(spec.wandb.key_file)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # offline runs would still post telemetry, and wait
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb
        import wandb.errors

        mode = self.spec.wandb.mode
        if mode in ("auto", "online") and not _has_credentials(wandb):
            if mode == "online":
                cure = "set WANDB_API_KEY or wandb.key_file, or run `wandb login`"
                logger.warning(
                    "wandb.mode=online, but there is no key (%s); recorded offline in %s",
                    cure,
                    self.run_dir.wandb,
                )
            mode = "offline"
        elif mode == "auto":
            mode = "online"
        try:
            self.run = self._init(wandb, mode)
        except wandb.errors.Error as error:
            if mode == "offline":
                raise
            logger.warning(
                "W&B cannot be reached (%s); metrics are recorded offline, to upload them later: "
                "wandb sync %s/offline-run-*",
                " ".join(str(error).split()),
                self.run_dir.wandb,
            )
            wandb.teardown()  # otherwise the failed run still holds the id
            self.run = self._init(wandb, "offline")

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        self.run.log(
            {_panel(name): value for name, value in (logs or {}).items()}, step=state.global_step
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.finish()

    def _init(self, wandb: Any, mode: str) -> Any:
        wandb.setup(settings=wandb.Settings(silent=True))
        self.run_dir.wandb.mkdir(parents=True, exist_ok=True)
        return wandb.init(
            mode=mode,
            dir=str(self.run_dir.path),
            project=self.spec.wandb.project,
            group=self.spec.wandb.group,
            name=self.spec.run.name,
            id=self._id(),
            resume="allow",
            config=without_secrets(self.spec.model_dump(mode="json")),
            # send no data about the machine: no command line, environment, git state or console
            # text
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=INIT_TIMEOUT_S,
                finish_timeout=FINISH_TIMEOUT_S,
                host="",
                disable_git=True,
                disable_code=True,
                save_code=False,
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )

    def _id(self) -> str:
        """Return the run's id, which is drawn once and kept in the run directory."""
        path = self.run_dir.wandb / "run_id"
        with suppress(OSError, ValueError):
            if re.fullmatch(r"[\w-]{1,128}", known := path.read_text().strip()):
                return known
        # none yet, or damaged: the resumed run is then a new one of W&B
        write_atomically(path, drawn := secrets.token_hex(4))
        return drawn


def without_secrets(value: Any) -> Any:
    """Return the settings without secrets: values of secret environment variables are blanked, also
    inside strings.
    """
    hidden = [
        text for name, text in os.environ.items() if SECRET_NAME.search(name) and len(text) >= 8
    ]

    def clean(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {key: clean(item, str(key)) for key, item in value.items()}
        if isinstance(value, list):
            return [clean(item, name) for item in value]
        if not isinstance(value, str):
            return value
        # a user's kwargs may contain a key; our own settings with such names (pad_token) hold no
        # secret
        if re.search(r"api_?key|secret|passw|auth_?token|access_?token", name, re.IGNORECASE):
            return "***"
        for text in hidden:
            value = value.replace(text, "***")
        return value

    return clean(value)


def _read_key(path: str) -> str:
    """Read the W&B key from a file.

    Raises:
        UserError: the file cannot be read or is empty, or other users may read it.
    """
    try:
        if os.stat(path).st_mode & 0o077:
            raise UserError("wandb.key_file", path, "can be read by others", f"chmod 600 {path}")
        key = Path(path).read_text().strip()
    except OSError as error:
        rule = f"cannot be read on {os.uname().nodename} ({error.strerror})"
        raise UserError("wandb.key_file", path, rule, "use a file that rank 0 can read") from None
    if not key:
        raise UserError(
            "wandb.key_file",
            path,
            "is empty",
            "write the key from https://wandb.ai/authorize to it",
        )
    return key


def _panel(name: str) -> str:
    """Return the name of a metric in W&B, with the groups of transformers' own callback."""
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


def _has_credentials(wandb: Any) -> bool:
    """Return whether there is a key (environment or netrc), without network access."""
    wandb.setup(settings=wandb.Settings(silent=True))
    try:
        from wandb.sdk.lib import wbauth  # not public; without it the public property below decides

        host = wandb.setup().settings.base_url
        return (
            wbauth.authenticate_session(
                host=host, source="init", prompt=False, update_session=False
            )
            is not None
        )
    except wandb.errors.AuthenticationError:
        return False
    except (ImportError, AttributeError, TypeError):
        return bool(wandb.api.api_key)
