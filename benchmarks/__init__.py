"""What the numbers in docs/benchmarks.md come from: every script runs a named peer beside Spillway, in turns."""
