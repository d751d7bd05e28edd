"""Each rank's watch over another one, so that the death of one is the end of the job."""

import os
import sys
import threading
from contextlib import suppress
from datetime import timedelta

import torch as th
import torch.distributed as dist

ENDS_WELL, FAILS = 1, 2


class Watch:
    """Ends this process when the rank before it dies, or fails; that ends the next one, and so round the circle.

    For launchers that let the others go on, as srun does unless told otherwise. The others may be far from the next
    exchange with the dead; and one over nccl waits half an hour. Every rank must make its own.
    """

    def __init__(self):
        # A group of its own: gloo breaks all connections of a group in which an exchange takes too long, and in the
        # default group a user's messages could be taken for the watch's.
        self.group = dist.new_group(backend="gloo")
        self.rank, size = self.group.rank(), self.group.size()
        self.before, self.after = (self.rank - 1) % size, (self.rank + 1) % size
        self.word = th.zeros(1, dtype=th.uint8, device="cpu")
        self.work = self.group.recv([self.word], self.before, 0)
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self):
        try:
            self.work.wait(timedelta(days=3650))
        except RuntimeError:
            with suppress(OSError, ValueError):  # nobody may be reading any more
                said = f"\nrank {self.rank}: error: rank {self.before} has died, so the job ends"
                print(said, file=sys.stderr, flush=True)
        if self.word.item() != ENDS_WELL:
            self.tell(FAILS)
            with suppress(OSError, ValueError):
                sys.stdout.flush()
            os._exit(1)

    def tell(self, word):
        """Say how this rank ends: ENDS_WELL, or FAILS where the user has been told why."""
        with suppress(RuntimeError):
            word = th.tensor([word], dtype=th.uint8, device="cpu")
            self.group.send([word], self.after, 0).wait(timedelta(seconds=3))

    def wait(self, seconds=None):
        """Wait until the rank before ends, at most so long.

        Interpreters must not end before: the thread would want one that is shutting down, which aborts the process.
        """
        self.thread.join(seconds)
