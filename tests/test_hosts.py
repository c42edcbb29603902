"""Two hosts: network namespaces of this machine, joined by a cable that can be cut. A cut cable says nothing: no connection
is closed, so only what counts seconds notices. Needs no root where users may make namespaces.
"""

import ctypes
import runpy
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing import Process, get_context
from pathlib import Path

import pytest
from conftest import ROOT
from test_train import equal, weights
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

from checkpoint import find_state, find_states

MASTER = "10.77.0.1"
PATIENCE = 5  # seconds


class Host:
    """A process that does nothing but keep a namespace, with its own user namespace or in that of another host."""

    def __init__(self, *command: str):
        self.process = subprocess.Popen([*command, "sh", "-c", "echo && exec sleep 600"], stdout=subprocess.PIPE)
        if not self.process.stdout.readline():
            pytest.skip("network namespaces cannot be made here")
        self.inside = ["nsenter", f"--target={self.process.pid}", "--user", "--net", "--preserve-credentials"]

    def ip(self, *command: str) -> None:
        subprocess.run([*self.inside, "ip", *command], check=True)

    def enter(self) -> None:
        """Puts this process there. It must have one thread."""
        for kind in ("user", "net"):
            with open(f"/proc/{self.process.pid}/ns/{kind}") as namespace:
                assert ctypes.CDLL(None).setns(namespace.fileno(), 0) == 0


@pytest.fixture
def hosts():
    if missing := [name for name in ("unshare", "nsenter", "ip") if not shutil.which(name)]:
        pytest.skip(f"no {missing[0]} here")
    made = [Host("unshare", "--map-root-user", "--net")]
    made.append(Host(*made[0].inside, "unshare", "--net"))
    try:
        made[0].ip("link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", str(made[1].process.pid))
        for host, address in zip(made, (MASTER, "10.77.0.2"), strict=True):
            host.ip("address", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                host.ip("link", "set", device, "up")
        yield made
    finally:
        for host in made:
            host.process.kill()


@pytest.fixture
def torchrun(train, tiny_model, shards, tmp_path, monkeypatch):
    """torchrun(host, 12, out, "--nnodes", 2, …) -> process: torchrun's own agent on that host, for a run of 12 steps. Its ranks
    are forked, too, and need not import everything anew; what they say is in {out}{node}.txt. `train` has small pictures.
    """
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "cable")  # gloo would look up the name of the host, which is the same for both

    def call(host: Host, steps: int, out: Path, *options: object) -> Process:
        agent, *_ = config_from_args(parse_args([*map(str, options), "train_lora.py"]))
        agent.start_method = "fork"
        command = ["--model", tiny_model, "--data", shards, "--rank", 2, "--bs", 1, "--workers", 0, "--device", "cpu"]
        command += ["--steps", steps, "--save-every", 5, "--rank-timeout", PATIENCE, "--out", out, "--log-dir", f"{out}-runs"]

        def rank() -> None:
            sys.argv = ["train_lora.py", *map(str, command)]
            with suppress(SystemExit):
                runpy.run_path(str(ROOT / "train_lora.py"), run_name="__main__")

        def inside() -> None:
            sys.stdout = sys.stderr = open(f"{out}{options[-1]}.txt", "a", buffering=1)  # noqa: SIM115
            host.enter()
            try:
                elastic_launch(agent, rank)()
            except ChildFailedError:
                sys.exit(1)

        process = get_context("fork").Process(target=inside)
        process.start()
        return process

    return call


def statuses(processes: list[Process]) -> list[int | None]:
    """None for one that does not end."""
    for process in processes:
        process.join(60)
        process.terminate()
    return [process.exitcode for process in processes]


def test_a_host_that_is_cut_off_in_mid_run(hosts, torchrun, tmp_path):
    """Both sides end, and the same command goes on: in the end bit for bit as two processes of one host."""
    out = tmp_path / "out"
    told = lambda node: (tmp_path / f"out{node}.txt").read_text()  # noqa: E731

    def start(steps: int) -> list[Process]:
        how = "--nnodes", 2, "--nproc-per-node", 1, "--master-addr", MASTER, "--master-port", 29500, "--node-rank"
        return [torchrun(host, steps, out, *how, node) for node, host in enumerate(hosts)]

    agents = start(2000)
    while not find_states(out):
        time.sleep(0.01)
        assert agents[0].is_alive(), told(0)
    hosts[0].ip("link", "set", "cable", "down")
    since = time.monotonic()
    assert statuses(agents) == [1, 1]
    assert PATIENCE < time.monotonic() - since < PATIENCE + 10
    for node, missing in enumerate(("rank 1 of 2", "rank 0, or the host that keeps the list of ranks,")):
        assert told(node).count(f"{missing} does not answer, so rank {node} ends too; the same command goes on: ") == 1
        assert "Traceback" not in told(node)
    assert not list(out.glob(".*"))
    step = find_state("auto", out)[1]["run"]["step"]

    hosts[0].ip("link", "set", "cable", "up")
    assert statuses(start(step + 5)) == [0, 0], told(0)
    assert f"resume     step {step} of {out}/state-" in told(0)
    one = torchrun(hosts[0], step + 5, tmp_path / "one", "--nproc-per-node", 2, "--master-port", 29500, "--node-rank", 0)
    assert statuses([one]) == [0], (tmp_path / "one0.txt").read_text()
    assert equal(weights(out, step + 5), weights(tmp_path / "one", step + 5))
