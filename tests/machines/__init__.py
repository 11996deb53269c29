"""Recorded machines for the screens, and the program that records them from real sandbox disks."""
