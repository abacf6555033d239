"""Configuration of a slimmed Wav2Vec2: the stock one, and under `jaxslim` the blocks that differ from it.

Written by jaxslim, which is not needed to use it.
"""
import json

from transformers import Wav2Vec2Config

# What config.json says in place of GUARDED's value, so that a stock class stops instead of ignoring weights.
GUARD = "jaxslim: open this folder with AutoModel... and trust_remote_code=True"
GUARDED = "hidden_act"
# Digest of modeling_jaxslim.py. transformers takes configurations of the same text for one class, with one model class:
# without it the second of two folders opened in a process would get the model code of the first.
MODELING = ""


class JaxslimConfig(Wav2Vec2Config):
    model_type = "jaxslim-wav2vec2"

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        stock = config_dict.get("jaxslim_stock", {})
        return super().from_dict({**config_dict, **{k: v for k, v in stock.items() if k == GUARDED}}, **kwargs)

    def to_json_string(self, *args, **kwargs):
        values = json.loads(super().to_json_string(*args, **kwargs))
        if "jaxslim_stock" in values:
            values[GUARDED] = GUARD
        return json.dumps(values, indent=2, sort_keys=True) + "\n"
