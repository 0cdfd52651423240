"""Which layout a run over several ranks takes: what each rank holds of the model, chosen before it is loaded.

    replicate   all of it                                        where that fits
    hybrid      its rows of it, of those of its node (HSDP)      where there are several nodes, and that fits
    shard       its rows of it, of those of all ranks (FSDP2)    else

The first that fits is taken: it moves the least, and hybrid's weights are gathered within a node. Where not even shard's rows
fit, those of some layers wait in the host's memory, as many as the plan says (`planning/layouts.py`). Every rank makes the same
choice: what fits one and not another fits none.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch

from graftlm.base.precision import default_compute_dtype
from graftlm.config import PlanConfig, Precision, TrainConfig
from graftlm.distributed.group import Ranks
from graftlm.distributed.shard import SPLITS, can_split
from graftlm.errors import ConfigError, GraftError
from graftlm.formatting import size
from graftlm.planning.activations import Workload
from graftlm.planning.fitting import PlanCase
from graftlm.planning.hardware import free_machine_memory, local
from graftlm.planning.layouts import Cluster, Layout, laid_out, with_host_layers
from graftlm.planning.models import find
from graftlm.planning.plan import DEFAULT_MICRO_BATCH_TOKENS
from graftlm.training.memory import fits, setting_of, split_over


def check_alone(config: TrainConfig) -> None:
    """Raise ConfigError where one rank is to share its weights with others."""
    if config.ranks > 1:
        return
    if config.asks_for_host_layers:
        raise ConfigError(
            f"--offload-layers {config.offload_layers} is for weights that ranks share, and there is one rank; give "
            "--ranks N with --layout shard, or leave it out"
        )
    if config.splits_model:
        raise ConfigError(
            f"--layout {config.layout} splits a model over ranks, and there is one; give --ranks N, or leave it out"
        )


def choose_layout(
    config: TrainConfig, precision: Precision, device: torch.device, ranks: Ranks, note: Callable[[str], None]
) -> tuple[TrainConfig, Ranks]:
    """The config with what `auto` stands for, and the ranks, which know of their nodes where each has all weights.

    `precision` is that of the stored base. Raises ConfigError, on every rank, where nodes are not as hybrid needs them.
    """
    if ranks.size == 1:
        return config, ranks
    if config.layout == "auto":
        config, ranks = _first_that_fits(config, precision, device, ranks, note)
    elif config.layout == "hybrid":
        ranks = ranks.split_in_nodes()
    if not config.splits_model:
        return config, ranks
    with ranks.agreeing():
        own = planned_host_layers(config, precision, device, ranks)
    (count,) = ranks.largest([own])
    with ranks.agreeing():
        _check_host_memory(config, precision, device, ranks, count)
    if count and not config.asks_for_host_layers:
        note(
            f"the rows of {count} layers wait in the host's memory (--offload-layers {count}): the GPUs have no room for all"
        )
    return config.model_copy(update={"offload_layers": count}), ranks


def _first_that_fits(
    config: TrainConfig, precision: Precision, device: torch.device, ranks: Ranks, note: Callable[[str], None]
) -> tuple[TrainConfig, Ranks]:
    """The config with the first layout for which there is room; layers on the host are those of a model that is split."""
    in_nodes = _in_nodes(ranks)
    with ranks.agreeing():
        if config.asks_for_host_layers and not can_split():
            raise ConfigError(
                f"--offload-layers needs a PyTorch that splits models, {'.'.join(map(str, SPLITS))} or newer, found "
                f"{torch.__version__}; install it, or leave it out"
            )
        whole = not can_split()
        whole = whole or (not config.asks_for_host_layers and fits(config, precision, device, ranks.on_machine))
        node = whole or _node_is_enough(config, precision, device, in_nodes)
    split, over_all = ranks.largest([not whole, not node])
    if not split:
        return config.model_copy(update={"layout": "replicate"}), ranks
    why = "layers are to wait on the host" if config.asks_for_host_layers else "a rank alone has no room for it"
    if in_nodes.parts < ranks.size and not over_all:
        each = f"the {in_nodes.parts} ranks of each node (--layout hybrid)"
        note(f"the model is split over {each}: {why}")
        return config.model_copy(update={"layout": "hybrid"}), in_nodes
    note(f"the model is split over the ranks (--layout shard): {why}")
    return config.model_copy(update={"layout": "shard"}), ranks


def _node_is_enough(config: TrainConfig, precision: Precision, device: torch.device, in_nodes: Ranks) -> bool:
    """Whether a node's ranks have room for the model without layers on the host, or beside as many there as are asked for."""
    if not fits(config, precision, device, in_nodes.on_machine, split_over(in_nodes, config.host_layers)):
        return False
    return config.asks_for_host_layers or not planned_host_layers(config, precision, device, in_nodes)


def _in_nodes(ranks: Ranks) -> Ranks:
    """The ranks as hybrid takes them; as they are where it makes no sense."""
    try:
        return ranks.split_in_nodes()
    except ConfigError:
        return ranks


def planned_host_layers(config: TrainConfig, precision: Precision, device: torch.device, ranks: Ranks) -> int:
    """How many layers' rows wait on the host: as many as are asked for, else as the plan has them for the layout of `ranks`.

    All layers where not even that fits; 0 on a processor, and where the model is not known.
    """
    if config.offload_layers != "auto":
        return config.offload_layers
    found = _planned(config, precision, device, ranks)
    return 0 if found is None else found.offloaded


def _planned(config: TrainConfig, precision: Precision, device: torch.device, ranks: Ranks) -> Layout | None:
    """The plan of the split that these ranks have, with as many layers on the host as are asked for, or as it takes; None on a
    processor, and where the model is not known.

    The data are not read yet: it counts with one example of --max-length, or of the plan's own default, in a micro-batch.
    """
    card = local(str(device) if device.type == "cuda" else "cpu")
    if card.kind != "cuda":
        return None
    try:
        shape = find(config.model, trust_remote_code=config.trust_remote_code).shape
        length = config.max_length or int(PlanConfig.model_fields["max_length"].default)
        length = min(length, shape.max_positions or length)
        own = -(-config.batch_size // ranks.size)
        most = config.micro_batch_tokens or length
        together = own if config.optimizer_in_backward else max(1, min(own, most // length))
        load = Workload(
            tokens=together * length, target_tokens=together * (length - 1), longest=length, examples=together,
            micro_batches=-(-own // together), small=most < DEFAULT_MICRO_BATCH_TOKENS,
        )  # fmt: skip
        fused = find_spec("triton") is not None
        case = PlanCase(shape=shape, targets=config.targets, rank=config.rank, load=load, card=card, fused=fused)
        setting = setting_of(config, precision, config.compute_dtype or default_compute_dtype(device, training=True))
        cluster = Cluster(gpus=ranks.parts, nodes=ranks.size // ranks.parts)
        name = "hybrid" if ranks.node_ranks else "shard"
        asked = shape.layers if config.offload_layers == "auto" else min(config.offload_layers, shape.layers)
        found = with_host_layers(case, setting, cluster, name) if config.offload_layers == "auto" else None
        return found or laid_out(case, setting, cluster, name, asked)
    except GraftError:  # it is said, or does without a plan, when the base is loaded
        return None


def _check_host_memory(
    config: TrainConfig, precision: Precision, device: torch.device, ranks: Ranks, count: int
) -> None:
    """Raise ConfigError where this machine's memory has no room for what its ranks' layers on the host take."""
    found = _planned(config.model_copy(update={"offload_layers": count}), precision, device, ranks) if count else None
    if found is None:
        return
    needed, free = found.host * ranks.on_machine, free_machine_memory()
    if needed > free:
        raise ConfigError(
            f"with --offload-layers {count} each rank keeps {size(found.host)} in the host's memory, the {ranks.on_machine} on "
            f"this machine {size(needed)}, and it has {size(free)} free; give a smaller --offload-layers, more ranks, or a "
            "--base-precision of fewer bits"
        )
