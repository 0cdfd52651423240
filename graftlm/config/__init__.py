"""Every option of every command, once: its type, unit, default and one line of help.

The command line, the YAML file, the documentation (`docs/options.md`) and `config.json` of a run are all made from
these classes. A config is frozen and checked where it is built; an unknown key is refused with the nearest known one.

    TrainConfig      graft train       which base, which data, what is trained, how
    GenerateConfig   graft generate    a prompt through a base and, if asked, an adapter
    CheckConfig      graft check       what would be trained on, before anything is
"""

from graftlm.config.check import CheckConfig
from graftlm.config.fields import Compute, Config, Method, Precision
from graftlm.config.generate import GenerateConfig
from graftlm.config.train import TrainConfig

__all__ = ["CheckConfig", "Compute", "Config", "GenerateConfig", "Method", "Precision", "TrainConfig"]
