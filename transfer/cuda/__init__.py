"""Slots in GPU memory: the driver's calls, kernels compiled where they run, and checksums taken on the device.

Imports torch only inside functions, and nothing of CUDA until there are slots on such a device.
"""
