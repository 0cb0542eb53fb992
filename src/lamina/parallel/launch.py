"""How several processes are started: torchrun on one machine, and what Slurm and SkyPilot are given for several.

torch.distributed has no authentication and sends plain data: ranks meet on the loopback address on one machine, and on
several only in a network that no one else is in.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from lamina.errors import LaminaError
from lamina.specs import unknown


def arguments(processes: int, command: Sequence[str], restarts: int = 0) -> list[str]:
    """The argv that runs `lamina COMMAND...` as so many processes of this machine, for os.execv.

    They meet on 127.0.0.1 at a free port. restarts: how often all are started anew after one has died. Raises
    LaminaError for fewer than 1.
    """
    if processes < 1 or restarts < 0:
        raise LaminaError(f"nproc is {processes}, restarts {restarts}; at least 1 process and 0 restarts are needed")
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=1",
        f"--nproc-per-node={processes}",
        f"--max-restarts={restarts}",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0",
        "--local-addr=127.0.0.1",
        "-m",
        "lamina",
        *command,
    ]


SLURM = """\
#!/bin/bash
#SBATCH --job-name=lamina
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --signal=B:TERM@120
# One torchrun on each node; ranks meet on the first. Submit from the folder that holds the configuration: sbatch FILE
set -euo pipefail
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 torchrun \\
  --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node={gpus} \\
  --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$head:29500" \\
  -m lamina train {config} --resume auto &
trap 'kill -TERM $!; wait $!' TERM
wait $!
"""

SKY = """\
# sky launch FILE
name: lamina
num_nodes: {nodes}
resources:
  accelerators: H100:{gpus}
workdir: .
setup: pip install lamina
run: |
  torchrun --nnodes="$SKYPILOT_NUM_NODES" --nproc-per-node={gpus} --node-rank="$SKYPILOT_NODE_RANK" \\
    --master-addr="$(echo "$SKYPILOT_NODE_IPS" | head -n 1)" --master-port=29500 \\
    -m lamina train {config} --resume auto
"""

TEMPLATES = {"slurm": SLURM, "sky": SKY}


def template(kind: str, config: str, nodes: int, gpus: int) -> str:
    """The file that starts `lamina train CONFIG` on `nodes` machines of `gpus` GPUs each: "slurm" for sbatch, "sky" for
    SkyPilot. Raises LaminaError for another kind, and for fewer than 1 node or GPU."""
    if kind not in TEMPLATES:
        raise LaminaError(unknown("kind of launcher", kind, TEMPLATES))
    if nodes < 1 or gpus < 1:
        raise LaminaError(f"nodes is {nodes}, gpus {gpus}; both must be at least 1")
    return TEMPLATES[kind].format(config=shlex.quote(config), nodes=nodes, gpus=gpus)
