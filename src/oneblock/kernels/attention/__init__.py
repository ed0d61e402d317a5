"""Attention backends: fast forms of `model.context.reference_attention`, with the contract of `AttentionBackend`.

eager           any mask, soft cap, sinks, dropout; scores materialized for a block of queries at a time
sdpa            any mask; torch's fused attention
blocked_matmul  causal; two batched matmuls per block of queries, for short sequences on CPUs
flex            any mask, soft cap, sinks; FlexAttention on CUDA
cpu_operators   decode and causal prefill in bf16 on CPUs, with our C++ operators
"""
