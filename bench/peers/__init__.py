"""Peers measured and compared with, in an environment of their own (requirements.txt)."""
