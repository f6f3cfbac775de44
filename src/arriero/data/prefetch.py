"""Batches made ahead on another thread, while the training thread waits for the device."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Calls `make` for each of `keys`, in order, up to `depth` ahead of the reader, on a thread.

        for batch in Prefetch(lambda step: batches.batch(step, first, count), range(start, stop)):
            ...

    An exception of `make` comes out of the loop. Leaving the loop early needs `close()`, or `with`.

    Attributes:
        waited_ms: how long the reader waited for the item that it got last.
    """

    def __init__(self, make: Callable[[int], T], keys: Iterable[int], *, depth: int = 2) -> None:
        self.waited_ms = 0.0
        self._ready: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(make, keys), name="prefetch", daemon=True)
        self._thread.start()

    def _work(self, make: Callable[[int], T], keys: Iterable[int]) -> None:
        try:
            for key in keys:
                if not self._put(("item", make(key))):
                    return
            self._put(("end", None))
        except BaseException as error:  # handed to the reader, whatever it is
            self._put(("error", error))

    def _put(self, what: tuple[str, T | BaseException | None]) -> bool:
        while not self._stop.is_set():
            try:
                self._ready.put(what, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def __iter__(self) -> Prefetch[T]:
        return self

    def __next__(self) -> T:
        began = time.perf_counter()
        kind, value = self._ready.get()
        self.waited_ms = 1000 * (time.perf_counter() - began)
        if kind == "end":
            self._ready.put((kind, value))  # the next call raises it again
            raise StopIteration
        if isinstance(value, BaseException):
            self._ready.put((kind, value))
            raise value
        return value  # type: ignore[return-value]

    def close(self) -> None:
        """Stops the thread."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
