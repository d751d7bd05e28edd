"""Several processes under mpiexec that share the images of an evaluation. One process needs no MPI."""

import os
import sys
import time

SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


class Ranks:
    """This process among its like.

    :ivar rank, size: its number, and how many there are.
    """

    def __init__(self):
        self.comm, self.rank, self.size, self.local_rank = None, 0, 1, 0
        if max(int(os.environ.get(name, 1)) for name in SIZE_VARIABLES) > 1:
            try:
                from mpi4py import MPI
            except (ImportError, RuntimeError) as e:
                sys.exit(
                    f"error: started by an MPI launcher, but mpi4py finds no MPI library ({str(e).splitlines()[0]}): "
                    f"pip install mpi4py mpich, or start one process"
                )
            self.comm = MPI.COMM_WORLD
            self.rank, self.size = self.comm.Get_rank(), self.comm.Get_size()
            self.local_rank = self.comm.Split_type(MPI.COMM_TYPE_SHARED).Get_rank()

    def share(self, count, batch_size):
        """This rank's part of `count` things: a range of whole batches, the same batches for any number of ranks.

        Convolutions round by what else is in a batch: so all ranks together find the very features that one would.
        """
        batches = -(-count // batch_size)
        first, last = (rank * batches // self.size * batch_size for rank in (self.rank, self.rank + 1))
        return range(min(first, count), min(last, count))

    def gather(self, value):
        """Every rank's value, in the order of ranks, on rank 0; None on the others."""
        return self.comm.gather(value) if self.comm is not None else [value]

    def gather_all(self, value):
        """Every rank's value, in the order of ranks, on every rank."""
        return self.comm.allgather(value) if self.comm is not None else [value]

    def fail(self, message, status):
        """End all ranks with an error. The first rank to come here says why; most mistakes show on all of them."""
        if self.comm is None:
            print(message, file=sys.stderr)
            sys.exit(status)
        if self.rank > 0:
            time.sleep(1)  # for rank 0 to say the same, and end this one
        print(message, file=sys.stderr, flush=True)
        time.sleep(0.3)  # for the launcher to pass it on
        self.comm.Abort(status)
