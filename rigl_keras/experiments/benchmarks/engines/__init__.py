"""Compares engines that serve networks, each in a separate process.

catalogue      the engines, their file formats and environments
environments   creates these environments, once, in the cache
network_files  writes a network in the format of each engine
torch_files    does so for PyTorch, in a process that can import PyTorch
worker         the script of a process; it imports only NumPy and its engine
processes      starts, asks, stops and ends such processes
turns          checks that engines agree, and times them in turns
records        the measurements: rows, files and tables
engine_figure  the figure
"""
