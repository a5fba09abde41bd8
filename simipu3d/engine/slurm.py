"""Who starts the processes of a run inside a SLURM job, and do the job and the configuration agree?

`srun` starts all of them when it was given as many tasks as the configuration asks processes for. A job of one task is
like a machine of its own: the process starts the others, as without SLURM. Everything else would wait for processes that
never come, and is one line.
"""

import os
from collections.abc import Mapping

from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment

from simipu3d.errors import UserError

WAY_OUT = (
    "in a batch file set --nodes=N and --ntasks-per-node=D as trainer.num_nodes and trainer.devices are, and start with srun; "
    "in an interactive shell unset SLURM_NTASKS"
)


def processes_of_job(devices: int | str, num_nodes: int) -> ClusterEnvironment | None:
    """How Lightning shall find its processes; None: as it does without SLURM.

    Args:
        devices: `trainer.devices`.
        num_nodes: `trainer.num_nodes`.

    Raises:
        UserError: the job's tasks are not the processes that the configuration asks for.
    """
    if "SLURM_NTASKS" not in os.environ or TorchElasticEnvironment.detect():
        return None
    if SLURMEnvironment.job_name() in ("bash", "interactive"):  # Lightning's own rule
        return None
    tasks = _number(os.environ, "SLURM_NTASKS")
    if tasks == 1 and num_nodes == 1:
        return LightningEnvironment()
    asked = None if devices == "auto" else int(devices) * num_nodes
    if asked is not None and asked != tasks:
        raise UserError(
            f"SLURM_NTASKS: this job has {tasks} tasks, trainer.devices={devices} x trainer.num_nodes={num_nodes} asks for "
            f"{asked} processes; {WAY_OUT}"
        )
    missing = [
        name for name in ("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID") if name not in os.environ
    ]
    if missing:
        raise UserError(
            f"SLURM_NTASKS: this job has {tasks} tasks, and this process was not started by srun ({missing[0]} "
            f"is not set); {WAY_OUT}"
        )
    for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"):
        _number(os.environ, name)
    for name, expected in (("SLURM_NTASKS_PER_NODE", devices), ("SLURM_NNODES", num_nodes)):
        found = _number(os.environ, name) if name in os.environ or name == "SLURM_NTASKS_PER_NODE" else expected
        if expected not in ("auto", found):
            key = "trainer.num_nodes" if name == "SLURM_NNODES" else "trainer.devices"
            raise UserError(f"{name}: {found} in this job, {key} is {expected}; {WAY_OUT}")
    return SLURMEnvironment(auto_requeue=False)


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isdigit():
        raise UserError(f"{name}: a number was expected, it is {text!r}; {WAY_OUT}")
    return int(text)
