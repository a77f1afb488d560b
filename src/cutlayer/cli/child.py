"""`python -m cutlayer.cli.child KEYS WORDS...`: the command line, for a process that another one has started.

The other one holds the writing end of a pipe that is this one's standard input. When it is gone, for whatever reason,
the pipe ends; so does this process then, as by Ctrl-C, and the folder of keys that was made for it goes too.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from typing import Final

from cutlayer.cli import main

__all__ = ["end_with"]

_GRACE: Final = 3.0  # seconds that this process has to end in good order
_INTERRUPTED: Final = 130


def end_with(pipe: int, keys: str) -> None:
    """End this process once a pipe has ended. Blocks; for a thread beside the main one.

    Args:
        pipe: Its descriptor.
        keys: A folder that is removed then.
    """
    while os.read(pipe, 4096):
        pass
    shutil.rmtree(keys, ignore_errors=True)
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    time.sleep(_GRACE)
    os._exit(_INTERRUPTED)  # it computes, or waits, where no signal gets through


def _begin() -> None:
    pipe, nothing = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # a module of the user's that reads what is typed finds nothing, and does not wait
    os.close(nothing)
    threading.Thread(target=end_with, args=(pipe, sys.argv.pop(1)), daemon=True).start()
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


if __name__ == "__main__":
    _begin()
