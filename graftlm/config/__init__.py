"""Every option of every command, once: its type, unit, default and one line of help.

The command line, the YAML file, the documentation (`docs/options.md`) and `config.json` of a run are all made from
these classes. A config is frozen and checked where it is built; an unknown key is refused with the nearest known one.

    TrainConfig      graft train       which base, which data, what is trained, how
    GenerateConfig   graft generate    a prompt through a base and optionally an adapter
    ServeConfig      graft serve       a base and all of its adapters over HTTP
    ChatConfig       graft chat        two answers side by side in the terminal
    CheckConfig      graft check       the examples that training would read
    PlanConfig       graft plan        memory and time of a run, before it is started
    CompareConfig    graft compare     full, LoRA and QLoRA side by side on one's own model and data
    SweepConfig      graft sweep       many trials on one base at once
    BoardConfig      graft board       one page over folders of runs and a store
    MergeConfig      graft merge       adapters merged into their base: a plain model, or a GGUF file
    adapters.py      graft adapters    versions of adapters: a class for each subcommand
"""

from graftlm.config.adapters import (
    AliasConfig,
    DiffConfig,
    ExportConfig,
    ImportConfig,
    ListConfig,
    PublishConfig,
    PullConfig,
    PushConfig,
    RemoveConfig,
    RollbackConfig,
    ShowConfig,
    VerifyConfig,
)
from graftlm.config.board import BoardConfig
from graftlm.config.chat import ChatConfig
from graftlm.config.check import CheckConfig
from graftlm.config.compare import CompareConfig
from graftlm.config.fields import ComputeDtype, Config, Method, Precision
from graftlm.config.generate import GenerateConfig
from graftlm.config.merge import MergeConfig
from graftlm.config.plan import PlanConfig
from graftlm.config.serve import ServeConfig
from graftlm.config.sweep import ShowSweepConfig, SweepConfig
from graftlm.config.train import TrainConfig

__all__ = [
    "AliasConfig", "BoardConfig", "ChatConfig", "CheckConfig", "CompareConfig", "ComputeDtype", "Config", "DiffConfig",
    "ExportConfig", "GenerateConfig", "ImportConfig", "ListConfig", "MergeConfig", "Method", "PlanConfig", "Precision",
    "PublishConfig", "PullConfig", "PushConfig", "RemoveConfig", "RollbackConfig", "ServeConfig", "ShowConfig",
    "ShowSweepConfig", "SweepConfig", "TrainConfig", "VerifyConfig",
]  # fmt: skip
