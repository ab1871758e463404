"""Send the functions and objects of a Python user to the workers, as bytes by their names."""

import pickle
from typing import Any

from orchestrator.run.ray.cluster import authenticate
from orchestrator.settings.errors import UserError, message_of, type_and_message
from orchestrator.settings.run import RunSpec
from orchestrator.training.user_objects import UserObjects
from orchestrator.world import World


def pickled_objects(spec: RunSpec, user: UserObjects) -> dict[str, bytes]:
    """Return the user's objects as bytes, which workers read when their modules can be imported.

    Raises:
        UserError: an object cannot be pickled.
    """
    if not user.parts:
        return {}
    authenticate(spec)
    from ray import cloudpickle

    pickled: dict[str, bytes] = {}
    for name, part in user.parts.items():
        try:
            pickled[name] = cloudpickle.dumps(part)  # pyright: ignore[reportPrivateImportUsage]
        except Exception as error:  # any object inside may raise any exception
            rule = f"cannot be sent to the workers ({message_of(error)})"
            later = "create models and open files when it is called"
            cure = f"store only names and paths in it, and {later}"
            raise UserError(name, repr(part), rule, cure) from None
    return pickled


def unpickled_objects(pickled: dict[str, bytes], world: World) -> UserObjects:
    """Return the user's objects on a worker; callbacks only on rank 0, as reading may open files.

    Raises:
        UserError: an object cannot be read here.
    """
    parts: dict[str, Any] = {}
    for name, part in pickled.items():
        if name == "callbacks" and not world.is_main:
            continue
        try:
            parts[name] = pickle.loads(part)
        except Exception as error:
            rule = f"cannot be read on a worker ({type_and_message(error)})"
            cure = "define it in a module of the folder where the command runs"
            raise UserError(name, "as sent", rule, cure) from None
    return UserObjects(**parts)
