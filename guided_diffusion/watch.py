"""Each rank's watch over another one, so that the death of one is the end of the job."""

import os
import sys
import threading
from contextlib import suppress
from datetime import timedelta

import torch as th

ENDS_WELL, FAILS = 1, 2


class Watch:
    """Ends this process when the rank before it dies, or fails; that ends the next one, and so round the circle.

    For launchers that let the others go on, as srun does unless told otherwise. The others may be far from the next
    exchange with the dead; and one over nccl waits half an hour.

    :param group: a gloo process group of all ranks.
    """

    def __init__(self, group):
        self.group, self.rank = group, group.rank()
        self.before, self.after = ((self.rank + step) % group.size() for step in (-1, 1))
        self.word = th.zeros(1, dtype=th.uint8)
        self.work = group.recv([self.word], self.before, 0)
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self):
        try:
            self.work.wait(timedelta(days=3650))
        except RuntimeError:
            said = f"\nrank {self.rank}: error: rank {self.before} has died, so the job ends"
            print(said, file=sys.stderr, flush=True)
        if self.word.item() != ENDS_WELL:
            self.tell(FAILS)
            os._exit(1)

    def tell(self, word):
        """Say how this rank ends: ENDS_WELL, or FAILS where the user has been told why."""
        with suppress(RuntimeError):
            self.group.send([th.tensor([word], dtype=th.uint8)], self.after, 0).wait(timedelta(seconds=3))

    def wait(self, seconds):
        """Wait for the rank before to end, at most so long."""
        self.thread.join(seconds)
