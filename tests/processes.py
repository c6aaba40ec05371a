"""Processes for the tests of many ranks: forked from a server that has imported torch once."""

import contextlib
import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def work(rank: int, world: int, port: int, results, function: Callable, arguments: tuple) -> None:
    """A rank: its place in the environment, as torchrun sets it; sends its result or its error."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    try:
        results.put((rank, function(*arguments)))
    except Exception as error:
        results.put((rank, error))


@contextlib.contextmanager
def processes(world: int, function: Callable, *arguments) -> Iterator[tuple[list, Callable]]:
    """function(*arguments) on `world` ranks: the processes, and a function that awaits a result.

    That function takes seconds and returns (rank, result or exception). All are killed at the end.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "train"])
    results, port = context.Queue(), free_port()
    started = [context.Process(target=work, args=(rank, world, port, results, function, arguments))
               for rank in range(world)]
    for process in started:
        process.start()
    try:
        yield started, lambda seconds: results.get(timeout=seconds)
    finally:
        for process in started:
            process.kill()
            process.join()
