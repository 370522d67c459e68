"""`d2ft-hpc doctor`: finds out in a minute what would otherwise end a job after hours in the queue."""

from d2ft_hpc.doctor.examine import examine

__all__ = ["examine"]
