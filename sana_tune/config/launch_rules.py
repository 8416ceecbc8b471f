"""Rules about processes and machines. Each is a function of what was asked and answers a Problem or None."""

from __future__ import annotations

from collections.abc import Callable

from sana_tune.config.launching import is_sharded, split
from sana_tune.config.schema import Config
from sana_tune.errors import Problem


def machines_are_known(config: Config) -> Problem | None:
    """Several machines must know which is which and where the first one is."""
    wanted = config.launch
    if (wanted.num_machines or 1) == 1:
        return None
    needed = {
        "machine_rank": wanted.machine_rank,
        "main_process_ip": wanted.main_process_ip,
        "main_process_port": wanted.main_process_port,
    }
    if missing := [key for key, value in needed.items() if value is None]:
        what = f"{wanted.num_machines} machines need machine_rank, main_process_ip and main_process_port; "
        fix = "machine_rank differs: 0 on the first machine, 1 on the second …; the other two are the same everywhere"
        return Problem("num_machines", f"{what}missing: {', '.join(missing)}", fix)
    return None


def machine_is_one_of_them(config: Config) -> Problem | None:
    """Machines are counted from 0."""
    rank, machines = config.launch.machine_rank, config.launch.num_machines or 1
    if rank is None or rank < machines:
        return None
    what = f"must be below num_machines {machines}: machines are counted from 0; found {rank}"
    return Problem("machine_rank", what, f"use 0 to {machines - 1}" if machines > 1 else "set num_machines, or drop it")


def machines_share_processes(config: Config) -> Problem | None:
    """num_processes counts those of all machines, each of which has as many."""
    machines, processes = config.launch.num_machines or 1, config.launch.num_processes
    if machines == 1 or (processes is not None and processes % machines == 0):
        return None
    found = "it is not set" if processes is None else f"found {processes}"
    what = f"counts the processes of all {machines} machines, which have as many each; {found}"
    return Problem("num_processes", what, f"use a multiple of {machines}: the GPUs of all machines together")


def release_needs_one_process(config: Config) -> Problem | None:
    """A gradient that is freed at once cannot be summed with those of other processes."""
    processes = config.launch.num_processes or 1
    if processes == 1 or not config.optimizer.optimizer_release_gradients:
        return None
    what = f"needs one process: several sum their gradients before a step; found {processes}"
    return Problem("optimizer_release_gradients", what, "train with one process, or switch it off")


def _splits(config: Config) -> bool:
    """Whether FSDP2 is to split the model over processes."""
    wanted = config.launch
    return wanted.processes > 1 and is_sharded(wanted.accelerate_config, split(wanted.accelerate_extra_args or ""))


def optimizer_can_be_split(config: Config) -> Problem | None:
    """FSDP2 splits every tensor by rows: an optimizer that works on blocks or on whole ones cannot be."""
    name = config.optimizer.optimizer
    if name.startswith(SHARDABLE) or not _splits(config):
        return None
    what = f"FSDP2 splits every tensor, which {name} cannot work with"
    return Problem("optimizer", what, "use optimi-adamw or torch-adamw, or train without FSDP")


def weights_can_be_split(config: Config) -> Problem | None:
    """Split weights are fp32: their share is small enough. An adapter's base, quantised or not, is whole."""
    model = config.model
    if not _splits(config):
        return None
    if model.model_type == "lora":
        what = "FSDP splits the weights over the processes, and adapters are put on whole ones; found model_type lora"
        return Problem("model_type", what, "train without FSDP: an adapter's states are small")
    if model.weights_dtype == "bf16":
        what = "FSDP2 is for fp32 weights here: it splits them, so that they take little room; found bf16"
        return Problem("weights_dtype", what, "use weights_dtype fp32, or train without FSDP")
    return None


def compiled_blocks_are_whole(config: Config) -> Problem | None:
    """What is compiled for whole tensors has no place in a split model."""
    asked = config.model.dynamo_backend
    if asked == "no" or not _splits(config):
        return None
    what = f"blocks that FSDP2 splits are not compiled here; found {asked}"
    return Problem("dynamo_backend", what, "use dynamo_backend no, or train without FSDP")


def rollouts_have_the_whole_model(config: Config) -> Problem | None:
    """Rollouts differ in length by process, so that forwards of a split model would wait for each other."""
    offset = config.rollout.scheduled_sampling_max_step_offset
    if not offset or not _splits(config):
        return None
    what = (
        f"rollouts need the whole model in every process, and FSDP splits it: lengths differ by process; found {offset}"
    )
    return Problem("scheduled_sampling_max_step_offset", what, "set it to 0, or train without FSDP")


def shards(config: Config) -> int:
    """Into how many parts weights, gradients, optimizer states and average are split; 1 = each process has them all."""
    return config.launch.processes if _splits(config) else 1


SHARDABLE = ("optimi-adamw", "torch-adamw", "torch-adam")

LAUNCH_RULES: tuple[Callable[[Config], Problem | None], ...] = (
    machines_are_known,
    machine_is_one_of_them,
    machines_share_processes,
    release_needs_one_process,
    optimizer_can_be_split,
    weights_can_be_split,
    compiled_blocks_are_whole,
    rollouts_have_the_whole_model,
)
