"""Runs of the real command in processes of their own, one or several that train together, which may be killed."""
import multiprocessing
import os
import signal
import socket
import sys
from multiprocessing.process import BaseProcess

import torch

CONTEXT = multiprocessing.get_context("forkserver")  # imports everything once, then each start takes no time
CONTEXT.set_forkserver_preload(["torch", "torch.distributed.tensor", "torch.distributed.fsdp",
                                "torch.distributed.checkpoint", "torch.utils.data", "train", "together", "small_runs"])
LIMIT = 300  # seconds


def child(environment: dict, path: str, arguments: list[str], kill_at: tuple[int, int] | None, function) -> None:
    """The life of one process: ``function(*arguments)``, killed as by a power cut at the beginning of a step, given as
    (step, steps of its stage)."""
    from training import loop
    from training.optim import learning_rate

    torch.set_num_threads(1)
    os.environ.update(environment)
    if path:
        with open(path, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)

    def rate(step, steps, config):
        if (step, steps) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return learning_rate(step, steps, config)

    loop.learning_rate = rate
    try:
        code = function(*arguments) or 0
    except (ValueError, OSError, RuntimeError, loop.Interrupted) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def command(*arguments: str) -> None:
    """train.py with these arguments."""
    import train
    train.main(list(arguments))


def start(world: int, arguments: list, kill: tuple[int, tuple[int, int]] | None = None, output: str = "",
          function=command) -> list[BaseProcess]:
    """Start ``world`` processes that run ``function`` together; ``kill`` = (rank, (step, steps)). Output of rank r goes
    to the file ``output``.r."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = []
    for rank in range(world):
        environment = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                       "LOCAL_WORLD_SIZE": str(world), "MASTER_PORT": str(port)}
        kill_at = kill[1] if kill and kill[0] == rank else None
        process = CONTEXT.Process(target=child, args=(environment, f"{output}.{rank}" if output else "", arguments,
                                                      kill_at, function))
        process.start()
        found.append(process)
    return found


def ended(processes: list[BaseProcess]) -> list[int]:
    """Exit codes, once all have ended."""
    for process in processes:
        process.join(LIMIT)
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.exitcode is None:
            process.kill()
            process.join()
    return codes


def run(world: int, arguments: list, kill: tuple[int, tuple[int, int]] | None = None, output: str = "",
        function=command) -> list[int]:
    """Start and wait; exit codes by rank."""
    return ended(start(world, arguments, kill, output, function))
