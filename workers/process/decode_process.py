"""Decode one image in a subprocess of its own, with a deadline and a memory limit. The subprocess answers in JSON and
raw pixels, never in pickle: it has parsed bytes that we do not trust."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import numpy as np

from jobs.errors import ContentError, TransientError
from workers.imaging.decode import DecodedImage, Limits, decode_image
from workers.process.crash_attribution import FatalFault
from workers.process.leases import Draining

DECODE_S = 120.0
"""Far more than the slowest sound image takes by itself."""
START_S = 120.0
DECODE_BYTES_PER_PIXEL = 32
"""More than any of the decoders holds at once."""
OVERHEAD_BYTES = 512_000_000
"""Memory of the subprocess beside the pixels: the file and the decoder's own tables."""
_CHECK_S = 0.2
"""Interval at which the worker checks whether it drains."""
_EXIT_MEMORY = 77
_PR_SET_PDEATHSIG = 1
_READY = b"ready"


class DecodeProcess:
    def __init__(self, *, draining: threading.Event, deadline_s: float = DECODE_S) -> None:
        self._draining = draining
        self._deadline_s = deadline_s

    def decode(
        self,
        data: bytes,
        *,
        limits: Limits,
        animation: Literal["first", "refuse"],
        on_ready: Callable[[], object],
    ) -> DecodedImage:
        """Decode as `decode_image` does. `on_ready` is called once the subprocess runs, before it gets the bytes.

        Raises `ContentError` as decoding does, and with `crashed_decoder`, `stalled`, `memory_exhausted`; `FatalFault`
        if the subprocess was killed; `Draining`; `TransientError` if no subprocess starts.
        """
        ours, theirs = multiprocessing.Pipe()
        spawn = multiprocessing.get_context("spawn")
        process = spawn.Process(target=_decode_here, args=(theirs, os.getpid(), limits, animation), daemon=True)
        process.start()
        theirs.close()
        try:
            with ours:
                return self._exchange(ours, data, on_ready)
        except (EOFError, ConnectionError) as exc:
            process.join()
            raise _error_of_exit(int(process.exitcode or 0)) from exc
        finally:
            process.kill()
            process.join()
            process.close()

    def _exchange(self, pipe: Connection, data: bytes, on_ready: Callable[[], object]) -> DecodedImage:
        try:
            self._wait_for(pipe, START_S)
            pipe.recv_bytes(len(_READY))
        except (EOFError, ConnectionError, TimeoutError) as exc:
            raise TransientError("No process for decoding could be started; see the log.", code="internal") from exc
        on_ready()
        pipe.send_bytes(data)
        try:
            self._wait_for(pipe, self._deadline_s)
        except TimeoutError as exc:
            text = f"A subprocess that decodes only this image did not finish within {self._deadline_s:g} s."
            raise ContentError(text, code="stalled") from exc
        answer = json.loads(pipe.recv_bytes())
        if "code" in answer:
            raise ContentError(answer["text"], code=answer["code"])
        planes = [np.frombuffer(pipe.recv_bytes(), np.uint8).reshape(shape).copy() for shape in answer["shapes"]]
        credit = tuple((name, text) for name, text in answer["credit"])
        return DecodedImage(planes[0], planes[1] if len(planes) > 1 else None, tuple(answer["notes"]), credit)

    def _wait_for(self, pipe: Connection, within_s: float) -> None:
        deadline = time.monotonic() + within_s
        while not pipe.poll(_CHECK_S):
            if self._draining.is_set():
                raise Draining
            if time.monotonic() > deadline:
                raise TimeoutError


def _error_of_exit(code: int) -> ContentError | FatalFault:
    """`code`: of a subprocess that ended while it decoded; negative: the signal that ended it."""
    if code == _EXIT_MEMORY:
        return ContentError(
            "Decoding takes more memory than any image of this size should: the file is damaged or malicious.",
            code="memory_exhausted",
        )
    if code == -signal.SIGKILL:
        return FatalFault(
            "The subprocess that decodes only this image was killed, as by the OOM killer.", code="killed"
        )
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    return ContentError(
        f"A subprocess that decodes only this image ended {how}: the file is damaged or malicious.",
        code="crashed_decoder",
    )


def _decode_here(parent: Connection, parent_id: int, limits: Limits, animation: Literal["first", "refuse"]) -> None:
    """Main function of the subprocess."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_id:
        os._exit(1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(
            number, signal.SIG_IGN
        )  # a signal to the process group is for the worker, which ends this process
    faulthandler.enable()
    parent.send_bytes(_READY)
    data = parent.recv_bytes()
    _limit_memory(limits)
    try:
        image = decode_image(data, limits=limits, animation=animation)
    except ContentError as exc:
        parent.send_bytes(json.dumps({"code": exc.code, "text": str(exc)}).encode())
        return
    except MemoryError:
        os._exit(_EXIT_MEMORY)
    _send(parent, image)


def _send(parent: Connection, image: DecodedImage) -> None:
    planes = [image.rgb] if image.alpha is None else [image.rgb, image.alpha]
    answer = {"shapes": [plane.shape for plane in planes], "notes": image.notes, "credit": image.credit}
    parent.send_bytes(json.dumps(answer).encode())
    for plane in planes:
        parent.send_bytes(np.ascontiguousarray(plane).data.cast("B"))


def _limit_memory(limits: Limits) -> None:
    """Limit private memory; files that libraries map do not count."""
    status = Path("/proc/self/status").read_text()
    used = int(status.split("VmData:")[1].split()[0]) * 1024
    limit = used + OVERHEAD_BYTES + DECODE_BYTES_PER_PIXEL * limits.max_pixels
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
