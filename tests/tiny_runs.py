"""What several test modules ask of runs of the command line."""

import csv
import os
import subprocess
import sys

import torch

from simipu3d.tools.pretrain import main
from simipu3d.weights.files import read_checkpoint

STEPS = 10
"""Of the run of `run_fixtures.tiny`."""


def call(capfd, *arguments):
    """Exit status of the command line in this process, and the lines it printed on standard error, log lines left out."""
    capfd.readouterr()
    status = main([str(argument) for argument in arguments])
    return status, [line for line in capfd.readouterr().err.splitlines() if line]


def start(*arguments, prefix=(), **environment):
    """The command line in a process of its own."""
    command = [*prefix, sys.executable, "-m", "simipu3d.tools.pretrain", *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True)


def checkpoint(out):
    return read_checkpoint(out / "checkpoints" / "last.ckpt")


def rows(out):
    """metrics.csv without what the clock and the machine decide."""
    with open(out / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in ("samples_per_second", "peak_memory_gb")} for row in table]


def same(one, other):
    """Do two runs end with the same weights, optimizer states and metrics, bit for bit?"""
    first, second = checkpoint(one), checkpoint(other)
    weights = all(torch.equal(first["state_dict"][name], value) for name, value in second["state_dict"].items())
    states = [content["optimizer_states"][0]["state"] for content in (first, second)]
    moments = all(torch.equal(states[0][i][name], v) for i, values in states[1].items() for name, v in values.items())
    return weights and moments and states[0].keys() == states[1].keys() and rows(one) == rows(other)
