"""Tuning constants that both the fast paths and `plan` read. Standard library only."""

from __future__ import annotations

# ------------------------------------------------------------------ attention

# Longest sequence that trains through two batched matmuls on CPUs, by bytes per element. torch's fused CPU attention
# has a slow backward pass: 8.1 against 1.0 ms in bf16 and 3.5 against 2.4 ms in fp32 for 32 sequences of 64 tokens,
# 4 heads of 32.
MATMUL_MAX_TRAINING_TOKENS = {2: 512, 4: 256}
# Most keys that a bf16 prefill on CPUs reads through matmuls; the many block sizes of longer ones fragment memory.
MATMUL_MAX_PREFILL_KEYS = 4096
# Queries per block of these matmuls: 8 sequences of 512 tokens in bf16, 12 heads of 64, take 21 ms; fused 70 ms.
MATMUL_BLOCK = 128
# Queries per block where a mask or the scores are materialized: memory stays linear in the sequence length.
MASK_BLOCK = 256
# Fewest queries for FlexAttention: below one block of its kernel a materialized mask is as fast.
FLEX_MIN_QUERIES = 128

# ------------------------------------------------------------------ training

LOSS_CHUNK_BYTES = 256 << 20  # logits and their gradient that the chunked LM-head projection holds at a time
