"""Runtimes that can be measured, one file each; a rival is imported only when it is asked for."""
