"""Two JAX hosts on this machine: a test file run twice as a program, with their address and its own number."""
import json
import os
import socket
import subprocess
import sys


def two(file: str, *words: str) -> list:
    """What `python FILE ADDRESS HOST *words` printed last, as JSON, for hosts 0 and 1. Fails if one fails."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    both = [subprocess.Popen([sys.executable, file, address, str(i), *words], env=env, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True) for i in range(2)]
    outs = []
    for process in both:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-2000:]
        outs.append(json.loads(out.splitlines()[-1]))
    return outs
