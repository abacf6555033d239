"""The slimming methods, by the name a recipe's stage uses."""
from jaxslim.methods.finetune import Finetune
from jaxslim.methods.linearize import Linearize

METHODS = {"train": Finetune, "linearize": Linearize}
