from .backbone import Backbone as Backbone
from .loading import ModelSpec as ModelSpec
from .logprobs.completions import LogProbs as LogProbs, completion_logprobs as completion_logprobs
from .lora import LoRA as LoRA
