"""Faults on the real path: real guests, real libvirt, the real command line; and a process that dies at every step."""
