"""Compress language models into 2:4 sparsity with int4, int8 or bf16 values, and read them back.

`import compressor` registers the checkpoint format with transformers as soon as transformers is imported, so that
`AutoModelForCausalLM.from_pretrained(OUT)` works; it imports neither torch nor transformers by itself.
"""

from compressor.registration import register_when_transformers_loads

__version__ = "0.1.0"

register_when_transformers_loads()
