"""Kernels and tile tables that several ops share."""
