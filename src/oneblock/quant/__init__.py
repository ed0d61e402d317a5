"""Quantization: int8, int4 and fp8 weight formats, their linear layers, GPTQ calibration, quality measures."""
