"""Compressors that ETC is compared with, one file each."""
