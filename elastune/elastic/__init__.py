"""Elastic twins of torch modules: the same function at a size that can be switched."""

from elastune.elastic.linear import ElasticConv1D, ElasticLinear
from elastune.elastic.lora import ElasticLoRALinear

__all__ = ["ElasticConv1D", "ElasticLinear", "ElasticLoRALinear"]
