"""Refuses to send Python objects between the processes of a run.

torch sends objects as pickles, and unpickling can run any code. arriero sends tensors, and JSON through the store. If
torch itself tries to send an object, as its pipeline does when a stage infers its shapes, the run ends with an error
before anything is unpickled.
"""

from __future__ import annotations

from typing import Any, NoReturn

PICKLE_FUNCTIONS = ("_object_to_tensor", "_tensor_to_object", "_pickler", "_unpickler")
"""Functions of torch.distributed.distributed_c10d that every call which sends or receives objects uses."""


class PickledObject(RuntimeError):  # noqa: N818 - what was refused
    """torch was about to pickle an object for another process, or to unpickle one from it."""


def refuse_pickled_objects() -> None:
    """Makes every call of torch.distributed that would pickle or unpickle an object raise PickledObject."""
    from torch.distributed import distributed_c10d

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise PickledObject("a Python object was to be sent between processes, as a pickle: arriero refuses them")

    for name in PICKLE_FUNCTIONS:
        setattr(distributed_c10d, name, refuse)
