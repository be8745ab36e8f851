"""Engines that serve networks, each in a separate process, compared.

catalogue      the engines, what each reads and in which environment it runs
environments   makes these environments, once, in the cache
network_files  writes a network in the format of each engine
torch_files    the same for PyTorch, in a process that has it
worker         the script of a process; it imports NumPy and its engine alone
processes      starts, asks, stops and ends such processes
turns          checks that they agree, and times them in turns
records        what was measured: rows, files and tables
engine_figure  the figure
"""
