"""Raw public dumps to clean text: the seven sources of LLaMA's training data.

A source is a module with ``stages``, which describes its pipeline of datatrove steps (see
``steps.py``). The same pipeline runs on one machine, on Slurm and on Ray.
"""
