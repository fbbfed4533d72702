"""Starts processes as torchrun does, by forking one that has loaded torch already.

Reads a line of JSON for each start, ``{"count", "code", "arguments", "folder"}``, and answers with
the process ids; the line ``null`` waits for them and answers with the exit codes. Each rank writes
to ``<rank>.out`` and ``<rank>.err`` in the folder.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

import torch._dynamo
from torch._C._distributed_c10d import TCPStore

import dpo.cli.train
import dpo.run  # noqa: F401


def start(order: dict[str, object], rank: int, port: int) -> int:
    """Fork one rank; return its process id."""
    child = os.fork()
    if child:
        return child
    count, folder = str(order["count"]), Path(str(order["folder"]))
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count, "RANK": str(rank), "LOCAL_RANK": str(rank),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "XDG_CACHE_HOME": str(folder / "cache"),
    }  # fmt: skip
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        with (folder / f"{rank}.{name}").open("w") as file:
            os.dup2(file.fileno(), stream.fileno())
    sys.argv = ["dpo", *map(str, order["arguments"])]  # type: ignore[call-overload]
    code = 1
    try:
        exec(str(order["code"]), {"__name__": "__main__"})
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    torch.set_num_threads(1)
    children: list[int] = []
    for line in sys.stdin:
        order = json.loads(line)
        if order is None:
            ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
            print(json.dumps(ends), flush=True)
            continue
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        children = [start(order, rank, store.port) for rank in range(order["count"])]
        print(json.dumps(children), flush=True)


if __name__ == "__main__":
    main()
