"""The slimming methods, by the name a recipe's stage uses."""
from jaxslim.methods.adapter import Adapter
from jaxslim.methods.distil_whisper import DistilWhisper
from jaxslim.methods.finetune import Finetune
from jaxslim.methods.generate import Generate
from jaxslim.methods.linearize import Linearize
from jaxslim.methods.lowrank import LowRank
from jaxslim.methods.prune import Prune
from jaxslim.methods.quantize import Quantize

METHODS = {"train": Finetune, "adapter": Adapter, "linearize": Linearize, "prune": Prune, "lowrank": LowRank,
           "quantize": Quantize, "generate": Generate, "distil_whisper": DistilWhisper}
