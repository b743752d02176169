"""Triton kernels, what they exchange with the host, and the forms in which they are
compiled.
"""
