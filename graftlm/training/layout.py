"""Which layout a run over several ranks takes: what each rank holds of the model, chosen before it is loaded.

    replicate   all of it                                        where that fits
    hybrid      its rows of it, of those of its node (HSDP)      where there are several nodes, and that fits
    shard       its rows of it, of those of all ranks (FSDP2)    else

The first that fits is taken: it moves the least, and hybrid's weights are gathered within a node. Every rank makes the same
choice: what fits one and not another fits none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from graftlm.config import Precision, TrainConfig
from graftlm.distributed.group import Ranks
from graftlm.distributed.shard import can_split
from graftlm.errors import ConfigError
from graftlm.training.memory import fits_whole


def choose_layout(
    config: TrainConfig, precision: Precision, device: torch.device, ranks: Ranks, note: Callable[[str], None]
) -> tuple[TrainConfig, Ranks]:
    """The config with the layout that `auto` stands for, and the ranks, which know of their nodes where each has all weights.

    `precision` is that of the stored base. Raises ConfigError, on every rank, where nodes are not as hybrid needs them.
    """
    if ranks.size == 1:
        return config, ranks
    if config.layout != "auto":
        return config, ranks.split_in_nodes() if config.layout == "hybrid" else ranks
    in_nodes = _in_nodes(ranks)
    with ranks.agreeing():
        whole = config.score is not None or not can_split() or fits_whole(config, precision, device, ranks.on_machine)
        node = whole or fits_whole(config, precision, device, ranks.on_machine, in_nodes.parts)
    split, over_all = ranks.largest([not whole, not node])
    if not split:
        return config.model_copy(update={"layout": "replicate"}), ranks
    if in_nodes.parts < ranks.size and not over_all:
        each = f"the {in_nodes.parts} ranks of each node (--layout hybrid)"
        note(f"the model is split over {each}: a rank alone has no room for it")
        return config.model_copy(update={"layout": "hybrid"}), in_nodes
    note("the model is split over the ranks (--layout shard): a rank alone has no room for it")
    return config.model_copy(update={"layout": "shard"}), ranks


def _in_nodes(ranks: Ranks) -> Ranks:
    """The ranks as hybrid takes them; as they are where it makes no sense."""
    try:
        return ranks.split_in_nodes()
    except ConfigError:
        return ranks
