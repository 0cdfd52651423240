"""Which layout a run over several ranks takes: what each rank holds of the model, chosen before it is loaded.

    replicate   all of it                                        where that fits
    hybrid      its rows of it, of those of its node (HSDP)      where there are several nodes, and that fits
    shard       its rows of it, of those of all ranks (FSDP2)    else

The first that fits is taken: it moves the least, and hybrid's weights are gathered within a node. Where not even rows fit,
those of some layers wait in the host's memory, as many as the plan says (`planning/layouts.py`). Every rank makes the same
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
from graftlm.planning.activations import Workload
from graftlm.planning.fitting import PlanCase
from graftlm.planning.hardware import local
from graftlm.planning.layouts import Cluster, layout_of
from graftlm.planning.models import find
from graftlm.planning.plan import DEFAULT_MICRO_BATCH_TOKENS
from graftlm.training.memory import fits, setting_of, split_over


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
        node = whole or fits(config, precision, device, ranks.on_machine, split_over(in_nodes))
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


def _in_nodes(ranks: Ranks) -> Ranks:
    """The ranks as hybrid takes them; as they are where it makes no sense."""
    try:
        return ranks.split_in_nodes()
    except ConfigError:
        return ranks


def planned_host_layers(config: TrainConfig, precision: Precision, device: torch.device, ranks: Ranks) -> int:
    """How many layers' rows wait on the host: as many as are asked for, else as the plan has them for the GPUs that share them.

    The data are not read yet. The plan is that of `graft plan --gpus N`, with one example of --max-length, or of the plan's
    own default, in a micro-batch. All layers where not even that fits; 0 on a processor, and where the model is not known.
    """
    if config.offload_layers != "auto":
        return config.offload_layers
    card = local(str(device) if device.type == "cuda" else "cpu")
    if card.kind != "cuda" or precision == "gguf":
        return 0
    try:
        shape = find(config.model, trust_remote_code=config.trust_remote_code).shape
        length = config.max_length or int(PlanConfig.model_fields["max_length"].default)
        length = min(length, shape.max_positions or length)
        most = config.micro_batch_tokens or length
        own = -(-config.batch_size * ranks.parts // ranks.size)  # of those that share one copy of the weights
        together = max(1, min(own, most // length))
        load = Workload(
            tokens=together * length, target_tokens=together * (length - 1), longest=length, examples=together,
            micro_batches=-(-own // together), small=most < DEFAULT_MICRO_BATCH_TOKENS,
        )  # fmt: skip
        fused = find_spec("triton") is not None
        case = PlanCase(shape=shape, targets=config.targets, rank=config.rank, load=load, card=card, fused=fused)
        compute_dtype = config.compute_dtype or default_compute_dtype(device, training=True)
        found = layout_of(case, setting_of(config, precision, compute_dtype), Cluster(gpus=ranks.parts))
    except GraftError:  # it is said, or does without a plan, when the base is loaded
        return 0
    return shape.layers if found is None else found.offloaded
