"""Several processes: their gradient, and ranks that never start, die, hang, diverge or lose the network.

Two hosts are two network namespaces of this machine, joined by a virtual cable that can be cut. A cut cable closes no
connection, so only a timeout notices it. Needs no root if users may create namespaces.
"""

import ctypes
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from multiprocessing import Process, get_context
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ONE_HOST, fork_torchrun, run
from test_train import equal, last, weights
from two_ranks import gradient_and_step

from lora import Adapter
from run.ranks import enter, join_ranks
from run.state import find_state, find_states

MASTER = "10.77.0.1"
TIMEOUT = 5  # --rank-timeout, in seconds


class Host:
    """A process that only keeps a network namespace alive, in a user namespace of its own or in that of another host."""

    def __init__(self, *command: str):
        self.process = subprocess.Popen([*command, "sh", "-c", "echo && exec sleep 600"], stdout=subprocess.PIPE)
        if not self.process.stdout.readline():
            pytest.skip("network namespaces cannot be made here")
        self.inside = ["nsenter", f"--target={self.process.pid}", "--user", "--net", "--preserve-credentials"]

    def ip(self, *command: str) -> None:
        subprocess.run([*self.inside, "ip", *command], check=True)

    def enter(self) -> None:
        """Moves this process into the namespaces. It must have only one thread."""
        for kind in ("user", "net"):
            with open(f"/proc/{self.process.pid}/ns/{kind}") as namespace:
                assert ctypes.CDLL(None).setns(namespace.fileno(), 0) == 0


@pytest.fixture
def hosts():
    """Two hosts, joined by the network device "cable"."""
    if missing := [name for name in ("unshare", "nsenter", "ip") if not shutil.which(name)]:
        pytest.skip(f"no {missing[0]} here")
    pair = [Host("unshare", "--map-root-user", "--net")]
    pair.append(Host(*pair[0].inside, "unshare", "--net"))
    try:
        pair[0].ip("link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", str(pair[1].process.pid))
        for host, address in zip(pair, (MASTER, "10.77.0.2"), strict=True):
            host.ip("address", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                host.ip("link", "set", device, "up")
        yield pair
    finally:
        for host in pair:
            host.process.kill()


@pytest.fixture
def agent(train, tiny_model, shards, tmp_path):
    """agent(out, ["--steps", 12], "--nproc-per-node", 2, …, host=…) starts torchrun's agent on `host`; returns its process.

    Its ranks are forks of this process, which need no imports. Their output goes to {out}{node}.txt. Uses the fixture `train`,
    which makes the pictures smaller.
    """

    def call(out: Path, training: list, *options: object, node: int = 0, host: Host | None = None) -> Process:
        command = ["--model", tiny_model, "--data", shards, "--rank", 2, "--bs", 1, "--workers", 0, "--device", "cpu"]
        command += ["--rank-timeout", TIMEOUT, "--out", out, "--log-dir", f"{out}-runs", *training]
        enter_host = host.enter if host else lambda: None
        return fork_torchrun("train_lora.py", command, [*options, f"--node-rank={node}"], Path(f"{out}{node}.txt"), enter_host)

    return call


def statuses(processes: list[Process]) -> list[int | None]:
    """Waits for the processes and returns their exit codes, None for one that does not end."""
    for process in processes:
        process.join(120)
        process.terminate()
    return [process.exitcode for process in processes]


def test_two_ranks_have_the_gradient_of_one_rank_with_twice_the_batch(tiny_model, tmp_path):
    alone = gradient_and_step(str(tiny_model), 0, 1, lambda gradient: None)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    run(*torchrun, "tests/two_ranks.py", tiny_model, tmp_path / "result.pt")
    both = torch.load(tmp_path / "result.pt", weights_only=True)
    torch.testing.assert_close(both["grad"], alone["grad"], atol=1e-6, rtol=1e-4)
    assert alone["grad"].abs().max() > 1e-3
    assert not both["ranks differ"].any()
    assert both["union"].tolist() == [0, 1, 7]
    assert both["any"].tolist() == [True, False]
    assert both["first difference"] == ["other", None]


@pytest.mark.parametrize("fail", [lambda: os.kill(os.getpid(), signal.SIGSTOP), lambda: os._exit(9)], ids=["hangs", "dies"])
def test_all_other_ranks_name_the_rank_that_does_not_answer(fail, tmp_path, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        environment = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def join(rank: int) -> None:
        os.environ["RANK"] = str(rank)
        sys.stderr = open(tmp_path / str(rank), "w", buffering=1)  # noqa: SIM115
        os.dup2(sys.stderr.fileno(), 2)
        ranks = join_ranks(torch.device("cpu"), 4)
        ranks.any(False)
        if rank == 2:
            fail()
        ranks.any(False)
        ranks.any(False)

    ranks = [get_context("fork").Process(target=join, args=(rank,)) for rank in range(3)]
    for process in ranks:
        process.start()
    try:
        for rank, process in enumerate(ranks[:2]):
            process.join(120)
            output = (tmp_path / str(rank)).read_text()
            assert process.exitcode == 1, output
            assert f"rank 2 of 3 does not answer, so rank {rank} ends too" in output
            assert "Traceback" not in output
    finally:
        ranks[2].kill()


def test_a_rank_that_never_starts(monkeypatch):
    """With the store of torchrun's agent. Rank 0 leaves its entry in the store; rank 1 must not take that for an answer."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "WORLD_SIZE": 2}
    for rank in (0, 1):
        for name, value in (environment | {"TORCHELASTIC_USE_AGENT_STORE": True, "RANK": rank}).items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(SystemExit, match=f"rank {1 - rank} of 2 did not come within 1 seconds, so rank {rank} ends too"):
            enter(rank, 2, 1)


def test_a_rank_that_is_killed(train, agent, tmp_path, monkeypatch):
    """torchrun restarts all ranks, and the run goes on as if nothing had happened. Then one process continues it alone."""
    refresh, steps = Adapter.update_layers, itertools.count(1)

    def die(adapter):
        if next(steps) == 4 and (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
            os.kill(os.getpid(), signal.SIGKILL)
        refresh(adapter)

    options = ["--steps", 5, "--save-every", 3, "--resume", "none"]  # a restart by torchrun resumes all the same
    with monkeypatch.context() as patch:
        patch.setattr("lora.Adapter.update_layers", die)
        process = agent(tmp_path / "out", options, *ONE_HOST, "--max-restarts", 3)
    assert statuses([process]) == [0]
    output = (tmp_path / "out0.txt").read_text()
    assert output.count("batch      1 × 1 accumulated × 2 processes = 2") == 2
    assert f"resume     step 3 of {tmp_path}/out/state-1\n" in output
    assert output.count("wrote") == 1  # only rank 0 writes
    assert find_state("auto", tmp_path / "out")[1]["run"]["samples"] == 10
    assert statuses([agent(tmp_path / "undisturbed", options, *ONE_HOST)]) == [0]
    assert equal(weights(tmp_path / "out", 5), weights(tmp_path / "undisturbed", 5))
    out, _ = train("--steps", 6, "--bs", 1, "--rank-timeout", TIMEOUT)
    assert "step 5 of" in out
    assert "; processes 2 -> 1; no longer bit for bit\n" in out
    assert find_state("auto", tmp_path / "out")[1]["run"]["samples"] == 11  # the same images in the same order


def test_eight_ranks_make_the_run_of_two_that_accumulate(agent, tmp_path):
    """With plain gradient descent, which leaves differences of rounding as small as they are."""
    options = ["--steps", 2, "--no-pictures", "--check-ranks-every", 1, "--rank-dropout", 0.2, "--flip"]
    options += ["--caption-dropout", 0.3, "--trigger", "nrt", "--prior-share", 0.4, "--optimizer", "torch.optim.SGD", "--lr", 1]
    found = {}
    for processes, accumulated in ((2, 4), (8, 1)):
        out, host = tmp_path / str(processes), ["--nproc-per-node", processes, *ONE_HOST[2:]]
        assert statuses([agent(out, [*options, "--grad-accum", accumulated], *host)]) == [0], Path(f"{out}0.txt").read_text()
        assert f"batch      1 × {accumulated} accumulated × {processes} processes = 8\n" in Path(f"{out}0.txt").read_text()
        assert 0 < last(Path(f"{out}-runs"), "waiting_for_ranks") < 1
        found[processes] = weights(out, 2)
    for name, tensor in found[2].items():
        torch.testing.assert_close(found[8][name], tensor, atol=2e-6, rtol=1e-4, msg=lambda text, at=name: f"{at}: {text}")


@pytest.mark.parametrize(
    "options",
    [
        ["--trigger", "nrt", "--prior-share", 0.4, "--prior-weight", 2],  # the ranks differ in how many images learn the prior
        ["--trigger", "nrt", "--prior-share", 0.4, "--prior-weight", 2, "--prior-data", "{cutouts}"],
        ["--optimizer", "adafactor", "--ema", 0.9],
        ["--optimizer", "schedulefree"],
    ],
    ids=["prior", "prior data", "adafactor", "schedulefree"],
)
def test_two_ranks_resume_bit_for_bit(agent, cutouts, tmp_path, options):
    """They compare their weights after every step."""
    options = [cutouts if option == "{cutouts}" else option for option in options]
    options += ["--bs", 2, "--lr", 1e-2, "--no-pictures", "--check-ranks-every", 1]
    for name, steps in (("whole", 4), ("halves", 2), ("halves", 4)):
        process = agent(tmp_path / name, [*options, "--steps", steps], *ONE_HOST)
        assert statuses([process]) == [0], (tmp_path / f"{name}0.txt").read_text()
    assert f"resume     step 2 of {tmp_path}/halves/state-1; --steps 2 -> 4" in (tmp_path / "halves0.txt").read_text()
    assert equal(weights(tmp_path / "whole", 4), weights(tmp_path / "halves", 4))


def test_ranks_with_different_weights_end_without_saving(agent, tmp_path, monkeypatch):
    refresh, steps = Adapter.update_layers, itertools.count(1)

    def flip(adapter):
        """After the third step of rank 1: flips the last bit of one weight in two modules, and sends a signal to save."""
        if next(steps) == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
            for name in list(adapter.deltas)[7:9]:
                adapter.deltas[name][1].view(torch.int32)[0, 0] ^= 1
        refresh(adapter)

    monkeypatch.setattr("lora.Adapter.update_layers", flip)
    options = ["--steps", 9, "--save-every", 2]
    assert statuses([agent(tmp_path / "out", options, *ONE_HOST)]) == [1]
    first = list(find_state("auto", tmp_path / "out")[1]["layers"])[7]
    output = (tmp_path / "out0.txt").read_text()
    assert f"step 3: the ranks no longer hold the same LoRA, {first} is the first that differs: not saved\n" in output
    assert "Traceback" not in output
    assert sorted(os.listdir(tmp_path / "out")) == [
        ".lock", "pytorch_lora_weights_2.safetensors", "record.json", "report.html", "samples", "state-1",
    ]  # fmt: skip


def test_a_host_that_loses_the_network(hosts, agent, tmp_path, monkeypatch):
    """Both sides end. The same command then resumes, and gives bit for bit the weights of two processes on one host."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "cable")  # otherwise gloo looks up the host name, which is the same for both
    out, options = tmp_path / "out", ["--save-every", 5, "--steps"]

    def output(node: int) -> str:
        return (tmp_path / f"out{node}.txt").read_text()

    def start(steps: int) -> list[Process]:
        launch = "--nnodes", 2, "--nproc-per-node", 1, "--master-addr", MASTER, "--master-port", 29500
        return [agent(out, [*options, steps], *launch, node=node, host=host) for node, host in enumerate(hosts)]

    agents = start(2000)
    while not find_states(out):
        time.sleep(0.01)
        assert agents[0].is_alive(), output(0)
    hosts[0].ip("link", "set", "cable", "down")
    start_time = time.monotonic()
    assert statuses(agents) == [1, 1]
    assert TIMEOUT < time.monotonic() - start_time < TIMEOUT + 10
    for node, missing in enumerate(("rank 1 of 2", "rank 0, or the host that keeps the list of ranks,")):
        assert output(node).count(f"{missing} does not answer, so rank {node} ends too; the same command goes on: ") == 1
        assert "Traceback" not in output(node)
    assert [path.name for path in out.glob(".*")] == [".lock"]
    step = find_state("auto", out)[1]["run"]["step"]

    hosts[0].ip("link", "set", "cable", "up")
    assert statuses(start(step + 5)) == [0, 0], output(0)
    assert f"resume     step {step} of {out}/state-" in output(0)
    one_host = agent(tmp_path / "one_host", [*options, step + 5], "--nproc-per-node", 2, "--master-port", 29500, host=hosts[0])
    assert statuses([one_host]) == [0], (tmp_path / "one_host0.txt").read_text()
    assert equal(weights(out, step + 5), weights(tmp_path / "one_host", step + 5))
