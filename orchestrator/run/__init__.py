"""Start and supervise workers: in this process or on this machine, on Ray and on Slurm."""
