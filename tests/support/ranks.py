"""Several processes on this machine, as the ranks of a process group."""

import socket

import torch.multiprocessing as mp


def over_ranks(ranks, worker, *arguments):
    """What the processes put into their queue, as it comes: one result of each.

    Each runs worker(rank, port, *arguments, results), with a free port for the rendezvous.
    """
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=worker, args=(rank, port, *arguments, results))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return found
