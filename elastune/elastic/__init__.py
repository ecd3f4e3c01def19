"""Elastic twins of torch modules: the same function at a size that can be switched."""

from elastune.elastic.base import ElasticModule
from elastune.elastic.lora import ElasticLoRALinear

__all__ = ["ElasticLoRALinear", "ElasticModule"]
