"""Which signals does a data worker obey? Those of the process that started it, and no others.

Schedulers and Ctrl-C signal all processes of a job at once. The training process then still ends its step and writes a
checkpoint, which it cannot do when its workers die under it. A worker whose parent is gone ends by itself within seconds
(torch's loader looks).
"""

import os
import signal
import threading


def obey_only_the_parent() -> None:
    """Called first in a worker: SIGINT and SIGUSR1 are ignored, SIGTERM counts when the parent sent it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # A handler is not told who sent the signal, a waiting thread is; it has to be blocked in all threads for that.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_wait_for_the_parent, args=(os.getppid(),), daemon=True).start()


def _wait_for_the_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
