"""Start and supervise workers: in this process, on Ray and on Slurm; the only folder that imports
ray.
"""
