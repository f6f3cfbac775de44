"""No Python object travels between the processes of a run.

torch sends objects as pickles, and to read a pickle is to run what it says. arriero sends tensors, and JSON through the
store. Should torch itself want to send an object, as its pipeline does where one stage asks for the shapes to be
inferred anew, the run ends with an error before anything is read.
"""

from __future__ import annotations

from typing import Any, NoReturn

PICKLE_FUNCTIONS = ("_object_to_tensor", "_tensor_to_object", "_pickler", "_unpickler")
"""What each of torch's calls that send or receive objects goes through, in torch.distributed.distributed_c10d."""


class PickledObject(RuntimeError):  # noqa: N818 - what was refused
    """torch was about to pickle an object for another process, or to unpickle one of its."""


def refuse_pickled_objects() -> None:
    """Has every call of torch.distributed that would pickle or unpickle an object raise PickledObject instead."""
    from torch.distributed import distributed_c10d

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise PickledObject("a Python object was to be sent between processes, as a pickle: arriero refuses them")

    for name in PICKLE_FUNCTIONS:
        setattr(distributed_c10d, name, refuse)
