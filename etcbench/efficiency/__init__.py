"""What a method costs: KV bytes, FLOPs in closed form, latency, throughput, peak memory.

Conventions, formulae and what is left out: docs/efficiency.md.
"""
