"""Start several Python processes at once, as on a cluster."""

import json
import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def launch(command, processes, folder, **environment):
    """Run Python in the given number of connected processes, and return their outputs."""
    workers = [f"127.0.0.1:{port}" for port in free_ports(processes)]
    # The CPU simulates several devices. In `make test-gpu`, the PyTorch processes share the GPU.
    on_gpu = os.environ.get("KERAS_DST_GPU") and os.environ.get("KERAS_BACKEND") == "torch"
    common = {
        **os.environ,
        **environment,
        **({} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""}),
        "PYTHONPATH": str(ROOT),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": workers[0].split(":")[1],
    }
    started, logs = [], []
    for rank in range(processes):
        own = {**common, "RANK": str(rank)}
        if processes > 1:
            task = {"type": "worker", "index": rank}
            own["TF_CONFIG"] = json.dumps({"cluster": {"worker": workers}, "task": task})
        logs.append(folder / f"{rank}.log")
        with logs[-1].open("w") as log:
            arguments = [sys.executable, *command]
            started.append(
                subprocess.Popen(arguments, cwd=ROOT, env=own, stdout=log, stderr=subprocess.STDOUT)
            )
    try:
        codes = [process.wait(timeout=900) for process in started]
    finally:
        for process in started:
            process.kill()
    outputs = [log.read_text() for log in logs]
    assert not any(codes), "\n".join(output[-3000:] for output in outputs)
    return outputs


def free_ports(number):
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
