"""Processes for the tests of many ranks, forked from a server that has imported `train` once."""

import contextlib
import multiprocessing
import os
import random
import sys
from collections.abc import Callable, Iterator
from multiprocessing import forkserver

import pytest
import torch


def server() -> multiprocessing.context.BaseContext:
    """The context whose processes start with torch and our modules imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "train"])
    with pytest.MonkeyPatch.context() as patch:  # the server does not take over sys.path
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    return context


def work(rank: int, world: int, port: int, results, function: Callable, arguments: tuple) -> None:
    """A rank: its place in the environment, as torchrun sets it; sends its result or its error."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        results.put((rank, function(*arguments)))
    except (Exception, SystemExit) as error:
        results.put((rank, error))


@contextlib.contextmanager
def processes(world: int, function: Callable, *arguments) -> Iterator[tuple[list, Callable]]:
    """function(*arguments) on `world` ranks: the processes, and a function that awaits a result.

    That function takes seconds and returns (rank, result or exception). All are killed at the end.
    """
    context = server()
    results = context.Queue()
    port = random.SystemRandom().randint(20_000, 32_000)  # Linux gives out only higher ones
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
